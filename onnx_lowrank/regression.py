"""Joint moments of inputs and targets, and the linear map between them (ALGORITHMS §6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from onnx_lowrank.linalg import Array

_CHUNK = 2048


class JointMoments:
    """Count, means and second moments of vectors x, and of x with y where there is a y.

    Products are made in the vectors' own precision, a chunk at a time, sums in float64.
    """

    def __init__(self, width: int, outputs: int = 0) -> None:
        self.count = 0
        self._sum, self._sum_y = np.zeros(width), np.zeros(outputs)
        self._products, self._cross = np.zeros((width, width)), np.zeros((outputs, width))

    def add(self, x: npt.NDArray[Any], y: npt.NDArray[Any] | None = None) -> None:
        """Accumulate vectors x (P×width) and y (P×outputs).

        Raises:
            ValueError: an entry is NaN or infinite, or its square is.
        """
        x = x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)
        for start in range(0, len(x), _CHUNK):
            chunk = x[start : start + _CHUNK]
            with np.errstate(over="ignore", invalid="ignore"):
                products = chunk.T @ chunk
            if not np.isfinite(np.trace(products)):
                raise ValueError("its values are not finite")
            self.count += len(chunk)
            self._sum += chunk.sum(axis=0, dtype=np.float64)
            self._products += products
            if y is not None:
                target = y[start : start + _CHUNK].astype(chunk.dtype, copy=False)
                self._sum_y += target.sum(axis=0, dtype=np.float64)
                self._cross += target.T @ chunk

    @property
    def mean(self) -> Array:
        """E[x], width."""
        return self._sum / max(self.count, 1)

    @property
    def mean_y(self) -> Array:
        """E[y], outputs."""
        return self._sum_y / max(self.count, 1)

    @property
    def second(self) -> Array:
        """E[xxᵀ], width×width."""
        return self._products / max(self.count, 1)

    @property
    def covariance(self) -> Array:
        """E[xxᵀ] − E[x]E[x]ᵀ, width×width."""
        return self.second - np.outer(self.mean, self.mean)

    def cross(self, *, centred: bool) -> Array:
        """E[yxᵀ], outputs×width; less E[y]E[x]ᵀ when centred."""
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
    step = scipy.linalg.solve(second + ridge * np.eye(width), residual.T, assume_a="pos").T
    return np.asarray(weight + share * step)
