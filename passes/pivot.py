"""Write a low-rank map by r of its own outputs, and the others as combinations of them.

    before   x -[ W  N×K, b ]-> y
    after    x -[ down  r×K ]- p -[ up  (N−r)×r ]- q;   Concat(p, q) -[ Gather, order restored ]-> y

An exact re-encoding of the rank-r solution (PIFA, arXiv 2501.19090; for a convolution the basis convolution of
arXiv 2408.06024). Pivots come from QR with column pivoting of U_rᵀ, swapped until no coefficient exceeds 2, so
that rounding is not amplified. Cost r(K+N−r) multiply-adds: below dense at every rank; Concat and Gather move
memory, which the measured time includes.
Left alone: nothing that svd and conv_svd take.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.fragment import Fragment, Kind, Op, X, Y, stored
from onnx_lowrank.linalg import Array, rank_revealing_rows
from onnx_lowrank.passes.linear import affine
from onnx_lowrank.sites import Geometry


def pivot_rows(geometry: Geometry, left: Array, right: Array, bias: Array) -> Fragment:
    """`left (right x) + bias` with left N×r (orthonormal columns), right r×K, bias N."""
    pivots, rest, coefficients = rank_revealing_rows(left)
    order = np.argsort(np.concatenate([pivots, rest]))
    own_bias = geometry.op != "MatMul"  # a MatMul has its Add after the Gather, where the runtime fuses it
    b_pivot = bias[pivots] if own_bias else None
    b_rest = bias[rest] - coefficients @ bias[pivots] if own_bias else None
    down, constants = affine(geometry, "down", X, "pivots", left[pivots] @ right, b_pivot, first=True)
    up, up_constants = affine(geometry, "up", "pivots", "rest", coefficients, b_rest, first=False)
    tail, tail_constants = _restore(geometry, order.astype(np.int64), bias)
    return Fragment((*down, *up, *tail), {**constants, **up_constants, **tail_constants})


def _restore(
    geometry: Geometry, order: npt.NDArray[np.int64], bias: Array
) -> tuple[tuple[Op, ...], dict[str, npt.NDArray[Any]]]:
    rank = len(geometry.x_shape) or 2
    axis = 1 if geometry.op == "Conv" else max(rank - (2 if geometry.side == "left" else 1), 0)
    constants: dict[str, npt.NDArray[Any]] = {"order": order}
    added = geometry.op == "MatMul" and geometry.bias
    ordered = "ordered" if added else Y
    ops = (
        Op("concat", "Concat", ("pivots", "rest"), "joined", {"axis": axis}),
        Op("order", "Gather", ("joined", "order"), ordered, {"axis": axis}),
    )
    if added:
        constants["bias"] = stored(bias, geometry)
        ops = (*ops, Op("bias", "Add", (ordered, "bias"), Y))  # type: ignore[assignment]
    return ops, constants


def pivot_cost(geometry: Geometry, rank: int) -> int:
    """Multiply-adds per position."""
    return rank * (geometry.inputs + geometry.outputs - rank)


PIVOT = Kind(name="pivot", applies=lambda geometry: True, cost=pivot_cost, build=pivot_rows)  # noqa: ARG005
