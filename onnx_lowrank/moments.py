"""Second moments of activations, streamed in float64; no activation is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.linalg import Array

_CHUNK_BYTES = 64 << 20


def rows(activation: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """An activation as positions × channels: the channel axis last, all others flattened."""
    moved = np.moveaxis(activation, axis, -1)
    return moved.reshape(-1, moved.shape[-1])


class Moments:
    """Count, mean and second moment of vectors of `width` channels.

    Args:
        own_precision: products of a chunk in the vectors' own precision, at least float32; sums are always float64.
    """

    def __init__(self, width: int, *, own_precision: bool = False) -> None:
        self.count = 0
        self._own_precision = own_precision
        self._sum = np.zeros(width)
        self._products = np.zeros((width, width))

    def add(self, vectors: npt.NDArray[Any]) -> None:
        """Accumulate vectors (P×width, any float dtype), a chunk at a time.

        Raises:
            ValueError: an entry is NaN or infinite, or its square is.
        """
        for chunk in self._chunks(vectors):
            self._take(chunk)

    def _chunks(self, vectors: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
        step = max(1, _CHUNK_BYTES // (8 * max(vectors.shape[1], 1)))
        keep = self._own_precision and vectors.dtype in (np.float32, np.float64)
        precision = vectors.dtype if keep else np.dtype(np.float32 if self._own_precision else np.float64)
        for start in range(0, len(vectors), step):
            yield vectors[start : start + step].astype(precision, copy=False)

    def _take(self, chunk: npt.NDArray[Any]) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            products = chunk.T @ chunk
        if not np.isfinite(np.trace(products)):
            raise ValueError("its values are not finite")
        self.count += len(chunk)
        self._sum += chunk.sum(axis=0, dtype=np.float64)
        self._products += products

    @property
    def mean(self) -> Array:
        """E[x], width."""
        return self._sum / max(self.count, 1)

    @property
    def second(self) -> Array:
        """E[xxᵀ], width×width."""
        return self._products / max(self.count, 1)

    @property
    def covariance(self) -> Array:
        """E[xxᵀ] − E[x]E[x]ᵀ, width×width."""
        found = self.second
        found -= np.outer(self.mean, self.mean)
        return found
