"""Write a low-rank map by r of its own outputs, and the others as combinations of them.

    before   x -[ W  N×K, b ]-> y
    after    x -[ down  r×K ]- p -[ up  (N−r)×r ]- q;   Concat(p, q) or Concat(q, p) -> y

An exact re-encoding of the rank-r solution (PIFA, arXiv 2501.19090; for a convolution the basis convolution of
arXiv 2408.06024). The pivots are the first r outputs or the last r, whichever gives the smaller coefficients: so
the order is never lost, and no Gather, which costs about as much as a dense MatMul, has to restore it (decision 013).
Cost r(K+N−r) multiply-adds: below dense at every rank; Concat moves memory, which the measured time includes.
Left alone: grouped and transposed convolutions, batches of matrices, sites where the coefficients would amplify the
rounding of the stored type.
"""

from __future__ import annotations

from onnx_lowrank.fragment import Fragment, Kind, X, Y
from onnx_lowrank.linalg import Array, end_pivots
from onnx_lowrank.passes.linear import AMPLIFIED, affine, amplification, joined
from onnx_lowrank.sites import Geometry


def pivot_rows(geometry: Geometry, left: Array, right: Array, bias: Array) -> Fragment:
    """`left (right x) + bias` with left N×r (orthonormal columns), right r×K, bias N."""
    pivots, rest, coefficients = end_pivots(left)
    own_bias = geometry.op != "MatMul"  # a MatMul has its Add after the Concat, where the runtime fuses it
    b_pivot = bias[pivots] if own_bias else None
    b_rest = bias[rest] - coefficients @ bias[pivots] if own_bias else None
    down, constants = affine(geometry, "down", X, "pivots", left[pivots] @ right, b_pivot, first=True)
    up, up_constants = affine(geometry, "up", "pivots", "rest", coefficients, b_rest, first=False)
    parts = ("pivots", "rest") if pivots.start == 0 else ("rest", "pivots")
    tail, tail_constants = joined(geometry, "concat", parts, Y, bias)
    return Fragment((*down, *up, *tail), {**constants, **up_constants, **tail_constants})


def well_conditioned(geometry: Geometry, left: Array) -> bool:
    """Whether left (N×r) can be written by its own end rows without amplifying the rounding of the stored type."""
    return amplification(geometry, end_pivots(left)[2]) <= AMPLIFIED


def pivot_cost(geometry: Geometry, rank: int) -> int:
    """Multiply-adds per position."""
    return rank * (geometry.inputs + geometry.outputs - rank)


PIVOT = Kind(
    name="pivot",
    applies=lambda geometry: geometry.groups == 1 and not geometry.batch and geometry.op != "ConvTranspose",
    cost=pivot_cost,
    build=pivot_rows,
    usable=well_conditioned,
)
