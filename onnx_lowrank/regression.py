"""Joint moments of inputs and targets, and the linear map between them (ALGORITHMS §6)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from onnx_lowrank.linalg import Array
from onnx_lowrank.moments import Moments, less_outer


@dataclasses.dataclass(frozen=True)
class Joint:
    """What vectors x, and y where there is one, have said.

    Attributes:
        count: vectors.
        mean: E[x], K.
        second: E[xxᵀ], K×K; the covariance when centred.
        mean_y: E[y], N.
        cross: E[yxᵀ], N×K; less E[y]E[x]ᵀ when centred.
    """

    count: int
    mean: Array
    second: Array
    mean_y: Array
    cross: Array


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

    def settled(self, *, centred: bool) -> Joint:
        """The moments, once all vectors are in: the sums become them, K² numbers are not copied."""
        mean, count = self.mean, max(self.count, 1)
        second, cross, mean_y = self._products, self._cross, self._sum_y / count
        del self._products, self._cross
        second /= count
        cross /= count
        if centred:
            less_outer(second, mean, mean)
            less_outer(cross, mean_y, mean)
        return Joint(count, mean, second, mean_y, cross)


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
    solver = scipy.linalg.cho_factor(regular.T, overwrite_a=True)  # transposed it lies as LAPACK wants it: no copy
    step = scipy.linalg.cho_solve(solver, residual.T).T
    return np.asarray(weight + share * step)
