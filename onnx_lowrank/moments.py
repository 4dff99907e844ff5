"""Second moments of activations, streamed in float64; no activation is kept."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.linalg import Array

MOST = 10_000
"""Width up to which second moments of a site's input are taken: 0.8 GB; wider ones would not fit into memory."""

_CHUNK_BYTES = 16 << 20
_PER_CHANNEL = 4  # a chunk has at least one vector for so many channels: adding up width×width is slow, too


def rows(activation: npt.NDArray[Any], axis: int | tuple[int, ...]) -> npt.NDArray[Any]:
    """An activation as positions × channels: the channel axes last and flattened, all others flattened."""
    axes = (axis,) if isinstance(axis, int) else axis
    moved = np.moveaxis(activation, axes, tuple(range(-len(axes), 0)))
    return moved.reshape(-1, math.prod(moved.shape[-len(axes) :]))


class Moments:
    """Count, mean and second moment of vectors of `width` channels.

    Vectors wait until there are enough of them for one large product: a width×width sum for every few of them would
    cost more than the products.

    Args:
        own_precision: products of a chunk in the vectors' own precision, at least float32; sums are always float64.
    """

    def __init__(self, width: int, *, own_precision: bool = False) -> None:
        self._own_precision = own_precision
        self._step = max(1, _CHUNK_BYTES // (8 * max(width, 1)), width // _PER_CHANNEL)
        self._waiting: list[tuple[npt.NDArray[Any], ...]] = []
        self._rows = 0
        self._count = 0
        self._sum = np.zeros(width)
        self._products = np.zeros((width, width))

    def add(self, vectors: npt.NDArray[Any]) -> None:
        """Accumulate vectors (P×width, any float dtype).

        Raises:
            ValueError: an entry is NaN or infinite, or its square is.
        """
        self._queue(vectors)

    def _queue(self, vectors: npt.NDArray[Any], *others: npt.NDArray[Any]) -> None:
        keep = self._own_precision and vectors.dtype in (np.float32, np.float64)
        precision = vectors.dtype if keep else np.dtype(np.float32 if self._own_precision else np.float64)
        for start in range(0, len(vectors), self._step):
            chunk, *rest = (a[start : start + self._step].astype(precision, copy=False) for a in (vectors, *others))
            with np.errstate(over="ignore", invalid="ignore"):
                power = np.einsum("ij,ij->", chunk, chunk)
            if not np.isfinite(power):
                raise ValueError("its values are not finite")
            self._waiting.append((chunk, *rest))
            self._rows += len(chunk)
            if self._rows >= self._step:
                self._drain()

    def _drain(self) -> None:
        if self._waiting:
            joined = [
                parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in zip(*self._waiting, strict=True)
            ]
            self._waiting, self._rows = [], 0
            self._take(*joined)

    def _take(self, chunk: npt.NDArray[Any], *others: npt.NDArray[Any]) -> None:
        del others
        self._count += len(chunk)
        self._sum += chunk.sum(axis=0, dtype=np.float64)
        self._products += chunk.T @ chunk

    @property
    def count(self) -> int:
        """Vectors so far."""
        return self._count + self._rows

    @property
    def mean(self) -> Array:
        """E[x], width."""
        self._drain()
        return self._sum / max(self.count, 1)

    @property
    def second(self) -> Array:
        """E[xxᵀ], width×width."""
        self._drain()
        return self._products / max(self.count, 1)

    @property
    def covariance(self) -> Array:
        """E[xxᵀ] − E[x]E[x]ᵀ, width×width."""
        found = self.second
        less_outer(found, self.mean, self.mean)
        return found


def less_outer(matrix: Array, left: Array, right: Array) -> None:
    """Take `left rightᵀ` off a matrix, in place and without one more of its size."""
    step = max(_CHUNK_BYTES // (8 * max(len(right), 1)), 1)
    for start in range(0, len(matrix), step):
        matrix[start : start + step] -= np.outer(left[start : start + step], right)
