"""Joint moments of inputs and targets, and the linear map between them (ALGORITHMS §6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from onnx_lowrank.linalg import Array
from onnx_lowrank.moments import Moments


class JointMoments(Moments):
    """Moments of vectors x, in their own precision, and of x with y where there is a y."""

    def __init__(self, width: int, outputs: int = 0) -> None:
        super().__init__(width, own_precision=True)
        self._sum_y, self._cross = np.zeros(outputs), np.zeros((outputs, width))

    def add(self, vectors: npt.NDArray[Any], targets: npt.NDArray[Any] | None = None) -> None:
        """Accumulate vectors x (P×width) and targets y (P×outputs).

        Raises:
            ValueError: an entry is NaN or infinite, or its square is.
        """
        self._queue(vectors, *([] if targets is None else [targets]))

    def _take(self, chunk: npt.NDArray[Any], *others: npt.NDArray[Any]) -> None:
        super()._take(chunk)
        for y in others:
            self._sum_y += y.sum(axis=0, dtype=np.float64)
            self._cross += y.T @ chunk

    @property
    def mean_y(self) -> Array:
        """E[y], outputs."""
        self._drain()
        return self._sum_y / max(self.count, 1)

    def cross(self, *, centred: bool) -> Array:
        """E[yxᵀ], outputs×width; less E[y]E[x]ᵀ when centred."""
        self._drain()
        found = self._cross / max(self.count, 1)
        return found - np.outer(self.mean_y, self.mean) if centred else found


def towards(weight: Array, second: Array, cross: Array, count: int, share: float) -> Array:
    """A weight moved from W towards the best linear map from x to y.

    The step is `share · (E[yxᵀ] − W S) (S + λI)⁻¹`: only what W leaves of the target is regressed, with a ridge that
    grows as the vectors get few, so that few of them change little.

    Args:
        weight: W, N×K.
        second: S of x, K×K.
        cross: E[yxᵀ], N×K.
        count: vectors that the moments stand on.
        share: m of the mixed target `(1 − m) W x + m y`.
    """
    width = len(second)
    ridge = float(np.trace(second)) / width * max(1e-4, 0.03 * width / max(count, 1))
    if ridge <= 0:
        return weight
    residual = cross - weight @ second
    regular = second.copy()
    regular.flat[:: width + 1] += ridge
    step = scipy.linalg.solve(regular, residual.T, assume_a="pos", overwrite_a=True).T
    return np.asarray(weight + share * step)
