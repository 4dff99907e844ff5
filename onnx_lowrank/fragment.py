"""Fragments: the few nodes and constants that a kind puts in place of a site. Data, not code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

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

    `owner` is the other part, where that is not the site of the patch; without a `name` it is the whole.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    owner: str = ""


@dataclasses.dataclass(frozen=True)
class Fragment:
    """Nodes in topological order from `x` to the outputs, most often `y` alone, and their constants by local name."""

    ops: tuple[Op, ...]
    constants: Mapping[str, npt.NDArray[Any]]
    outputs: tuple[str, ...] = (Y,)


Build = Callable[..., Fragment]
"""(geometry, factors, bias N) -> fragment.

Low rank: left N×r and right r×K compute `left (right x) + bias`; for g groups right is (g·r)×K. Nested, of one rank:
first r×(K/w), second N×(r·w); of two ranks: first s×(K/w), core r×(s·w), last N×r.
"""

Split = Literal["columns", "channels"]
"""How a nested kind splits a patch of C·kh·kw entries: `columns` into (C·kh) × kw, `channels` into C × (kh·kw).

The first factor reads the former, at each of the latter alike.
"""

Shapes = tuple[tuple[int, int], ...]

Size = tuple[int, int]
"""A rank, and the inner rank of a kind that has two, else 0."""


def split_width(geometry: Geometry, split: Split) -> int:
    """Entries w of a patch that the first factor reads alike."""
    return geometry.kernel[-1] if split == "columns" else math.prod(geometry.kernel)


def _low_rank_shapes(geometry: Geometry, rank: int) -> Shapes:
    return (geometry.outputs, rank), (geometry.groups * rank, geometry.inputs)


def _low_rank_full(geometry: Geometry) -> int:
    return min(geometry.outputs // geometry.groups, geometry.inputs)


def _always(geometry: Geometry, left: Array) -> bool:
    del geometry, left
    return True


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way to write a site: where it applies, what it costs, and the fragment it becomes.

    A kind has one rank, or two: then `rank` is that of the last factor and `inner` that of the first; `inner` is 0 for
    a kind of one rank.

    Attributes:
        name: as in `--kinds`.
        applies: whether a geometry can be written so.
        cost: multiply-adds per output position at a rank, or at a rank and an inner rank.
        build: the fragment.
        split: how a nested kind splits a patch; None is a low-rank matrix.
        shapes: of the factors at a rank, or at a rank and an inner rank.
        full: the rank at which it is exact (with `inner_full`, for two ranks).
        usable: whether a left factor (N×r) can be written so in the stored type.
        inner_full: the inner rank at which it is exact, or the largest; None for a kind of one rank.
        terms: how many groups its core has; both ranks are multiples of it.
    """

    name: str
    applies: Callable[[Geometry], bool]
    cost: Callable[..., int]
    build: Build
    split: Split | None = None
    shapes: Callable[..., Shapes] = _low_rank_shapes
    full: Callable[[Geometry], int] = _low_rank_full
    usable: Callable[[Geometry, Array], bool] = _always
    inner_full: Callable[[Geometry], int] | None = None
    terms: int = 1

    @property
    def ranks(self) -> int:
        """How many ranks it has, 1 or 2."""
        return 1 if self.inner_full is None else 2

    def macs(self, geometry: Geometry, rank: int, inner: int = 0) -> int:
        """Multiply-adds per output position at a size."""
        return self.cost(geometry, *self.size(rank, inner))

    def size(self, rank: int, inner: int = 0) -> tuple[int, ...]:
        """The ranks that `cost` and `shapes` take."""
        return (rank,) if self.ranks == 1 else (rank, inner)

    def filters(self, geometry: Geometry, rank: int, inner: int = 0) -> int:
        """How many first filters a nested fit must have at a size: those of several terms are mixed of more."""
        if self.terms == 1 or self.inner_full is None:
            return inner or rank
        return max(inner, min(2 * inner, self.inner_full(geometry)))

    def max_rank(self, geometry: Geometry) -> int:
        """Largest rank that costs fewer multiply-adds than the dense weight; 0 when there is none."""
        dense, inner = geometry.outputs * geometry.inputs, 1
        return next((r for r in range(self.full(geometry) - 1, 0, -1) if self.macs(geometry, r, inner) < dense), 0)

    def allows(self, geometry: Geometry, rank: int, inner: int = 0) -> bool:
        """Whether the kind applies and the size costs fewer multiply-adds than the dense weight."""
        if not self.applies(geometry) or not 0 < rank <= self.max_rank(geometry):
            return False
        most = 0 if self.inner_full is None else self.inner_full(geometry)
        if not min(most, 1) <= inner <= most or rank % self.terms or inner % self.terms:
            return False
        return self.macs(geometry, rank, inner) < geometry.outputs * geometry.inputs


def size_text(rank: int, inner: int = 0) -> str:
    """A size as it stands in tables of times: `64`, or `48x96` for the inner rank 48 and the rank 96."""
    return f"{inner}x{rank}" if inner else str(rank)


def parse_size(text: str) -> tuple[int, int] | None:
    """Rank and inner rank (0 where there is none) of a size's text; None for another text."""
    inner, _, rank = text.rpartition("x")
    if not rank.isdecimal() or (inner and not inner.isdecimal()):
        return None
    return int(rank), int(inner or 0)


def stored(array: Array, geometry: Geometry) -> npt.NDArray[Any]:
    """`array` in the dtype that the model stores (float32, float16, bfloat16, float64)."""
    return np.ascontiguousarray(array, dtype_of(geometry))


def dtype_of(geometry: Geometry) -> np.dtype[Any]:
    """NumPy dtype of a geometry; bfloat16 comes from ml_dtypes."""
    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, geometry.dtype, geometry.dtype))
    return found
