"""Fragments: the few nodes and constants that a kind puts in place of a site. Data, not code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnx_lowrank.linalg import Array
from onnx_lowrank.sites import Geometry

X, Y = "x", "y"
"""Local names of the tensor that enters a fragment and of the one that leaves it."""


@dataclasses.dataclass(frozen=True)
class Op:
    """One node of a fragment; `name` is its part of the node's name (`conv3/down`), inputs and output are local.

    `owner` is the other part, where that is not the site of the patch.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    owner: str = ""


@dataclasses.dataclass(frozen=True)
class Fragment:
    """Nodes in topological order from `x` to `y`, and their constants by local name."""

    ops: tuple[Op, ...]
    constants: Mapping[str, npt.NDArray[Any]]


Build = Callable[[Geometry, Array, Array, Array], Fragment]
"""(geometry, one factor, the other, bias N) -> fragment.

Low rank: left N×r and right r×K compute `left (right x) + bias`. Separable: first r×(C·kh), second N×(r·kw).
"""

Shapes = tuple[tuple[int, int], tuple[int, int]]


def _low_rank_shapes(geometry: Geometry, rank: int) -> Shapes:
    return (geometry.outputs, rank), (rank, geometry.inputs)


def _low_rank_full(geometry: Geometry) -> int:
    return min(geometry.outputs, geometry.inputs)


def _always(geometry: Geometry, left: Array) -> bool:
    del geometry, left
    return True


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way to write a site: where it applies, what it costs, and the fragment it becomes.

    Attributes:
        name: as in `--kinds`.
        applies: whether a geometry can be written so.
        cost: multiply-adds per output position at a rank.
        build: the fragment.
        separable: whether it is fitted as a separable kernel, on patches, and not as a low-rank matrix.
        shapes: of the two factors at a rank.
        full: the rank at which it is exact.
        usable: whether a left factor (N×r) can be written so in the stored type.
    """

    name: str
    applies: Callable[[Geometry], bool]
    cost: Callable[[Geometry, int], int]
    build: Build
    separable: bool = False
    shapes: Callable[[Geometry, int], Shapes] = _low_rank_shapes
    full: Callable[[Geometry], int] = _low_rank_full
    usable: Callable[[Geometry, Array], bool] = _always

    def max_rank(self, geometry: Geometry) -> int:
        """Largest rank that costs fewer multiply-adds than the dense weight; 0 when there is none."""
        dense = geometry.outputs * geometry.inputs
        return next((r for r in range(self.full(geometry) - 1, 0, -1) if self.cost(geometry, r) < dense), 0)


def stored(array: Array, geometry: Geometry) -> npt.NDArray[Any]:
    """`array` in the dtype that the model stores (float32, float16, bfloat16, float64)."""
    return np.ascontiguousarray(array.astype(dtype_of(geometry)))


def dtype_of(geometry: Geometry) -> np.dtype[Any]:
    """NumPy dtype of a geometry; bfloat16 comes from ml_dtypes."""
    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, geometry.dtype, geometry.dtype))
    return found
