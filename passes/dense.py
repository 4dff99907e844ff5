"""The dense site itself, as a fragment: what every other kind is timed against.

before   x -[ W N×K, b ]-> y
after    the same
"""

from __future__ import annotations

from onnx_lowrank.fragment import Fragment, X, Y
from onnx_lowrank.linalg import Array
from onnx_lowrank.passes.linear import affine
from onnx_lowrank.passes.transposed import transposed_whole
from onnx_lowrank.sites import Geometry


def dense_fragment(geometry: Geometry, weight: Array, bias: Array) -> Fragment:
    """The fragment of the site's own operator with its own weight (N×K) and bias (N)."""
    if geometry.op == "ConvTranspose":
        return transposed_whole(geometry, weight, bias)
    ops, constants = affine(geometry, "dense", X, Y, weight, bias, first=True)
    return Fragment(ops, constants)
