"""Write a linear map of positions as two thin ones.

    before   x -[ W  N×K, b ]-> y
    after    x -[ down  r×K ]- t -[ up  N×r, b ]-> y

MatMul, Gemm and 1×1 Conv. Exact at full rank; at rank r the least squares solution on the calibration
samples (ALGORITHMS §1). Strides go to the first factor, the bias to the second. Cost r(K+N) multiply-adds.
A MatMul of a batch of matrices becomes two of as many, all of the same rank. A ConvTranspose whose taps do not overlap
becomes a 1×1 Conv C→r and a ConvTranspose r→N (`transposed`). A grouped 1×1 Conv becomes two of as many groups, all of
the same rank; cost r(gK+N).
Left alone: k×k convolutions and overlapping ConvTransposes (`conv_svd` has them).
"""

from __future__ import annotations

from onnx_lowrank.fragment import Fragment, Kind, X, Y
from onnx_lowrank.linalg import Array
from onnx_lowrank.passes.linear import affine
from onnx_lowrank.passes.transposed import transposed_cost, transposed_factors
from onnx_lowrank.scales import levelled
from onnx_lowrank.sites import Geometry


def two_factors(geometry: Geometry, left: Array, right: Array, bias: Array) -> Fragment:
    """`left (right x) + bias` with left N×r, right (g·r)×K, bias N."""
    groups = geometry.groups
    read = left.reshape(groups, -1, left.shape[1]).swapaxes(1, 2)
    right, by_channel = levelled(right, read.reshape(len(right), -1), geometry.outputs)
    left = by_channel.reshape(read.shape).swapaxes(1, 2).reshape(left.shape)
    if geometry.op == "ConvTranspose":
        return transposed_factors(geometry, left, right, bias)
    down, down_constants = affine(geometry, "down", X, "thin", right, None, first=True)
    up, up_constants = affine(geometry, "up", "thin", Y, left, bias, first=False)
    return Fragment((*down, *up), {**down_constants, **up_constants})


def two_factor_cost(geometry: Geometry, rank: int) -> int:
    """Multiply-adds per position of two factors."""
    if geometry.op == "ConvTranspose":
        return transposed_cost(geometry, rank)
    return rank * (geometry.groups * geometry.inputs + geometry.outputs)


SVD = Kind(name="svd", applies=lambda geometry: geometry.pointwise, cost=two_factor_cost, build=two_factors)
