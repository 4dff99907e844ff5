"""Separable approximation of a 2-D kernel in the metric of the data: kh×1, then 1×kw (ALGORITHMS §2, `spatial`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from onnx_lowrank.linalg import Array

_RIDGE = 1e-7  # of the mean variance of the thin features
_SMALLEST = 1e-9  # of the largest variance: directions below are noise of the accumulation


@dataclass(frozen=True)
class Separable:
    """Best second factors for nested first factors, at every rank from one decomposition.

    With `A_r` the first r vertical filters, the thin features of a patch are `z = (A_r ⊗ I_kw) x`, and the second
    factor is the least squares solution `B = E[yzᵀ] E[zzᵀ]⁻¹` for the centred output y. The features of rank r are the
    first r·kw of those of rank R, so with `E[zzᵀ] = LLᵀ` the error at *every* rank is what the leading rows of
    `T = L⁻¹ E[zyᵀ]` leave of the output's power.

    Attributes:
        vertical: A, R×(C·kh), the most important filter first.
        lower: L, (R·kw)², of the features' covariance with a small ridge.
        coordinates: T, (R·kw)×N.
        total: E‖y‖².
        mean: E[x] as (C·kh)×kw.
        count: patches that the moments stand on.
    """

    vertical: Array
    lower: Array
    coordinates: Array
    total: float
    mean: Array
    count: int

    @property
    def largest(self) -> int:
        """Largest rank."""
        return len(self.vertical)

    def relative(self, rank: int) -> float:
        """Error at a rank as a fraction of the output's power, corrected for the coefficients fitted to few patches."""
        if self.total <= 0:
            return 0.0
        used = rank * self.mean.shape[1]
        error = max(1.0 - float(np.sum(self.coordinates[:used] ** 2)) / self.total, 0.0)
        free = self.count - used
        return min(error * self.count / free, 1.0) if free > 0 else 1.0

    def factors(self, rank: int) -> tuple[Array, Array, Array]:
        """First factor r×(C·kh), second N×(r·kw), and the mean of what they compute (N) without any bias."""
        used = rank * self.mean.shape[1]
        second = scipy.linalg.solve_triangular(
            self.lower[:used, :used], self.coordinates[:used], trans="T", lower=True
        ).T
        thin = (self.vertical[:rank] @ self.mean).reshape(-1)
        return self.vertical[:rank], second, second @ thin


def separable(
    weight: Array, covariance: Array, mean: Array, kernel: tuple[int, int], count: int, ranks: int
) -> Separable:
    """Vertical filters from the weight whitened by the columns' covariance, second factors by least squares.

    The start is the SVD of W as (C·kh)×(N·kw) (Jaderberg et al. 2014) in the metric of the mean covariance of a patch's
    columns; what it neglects, the correlation between columns, the least squares fit of the second factor takes in.

    Args:
        weight: N×(C·kh·kw).
        covariance: of the patches, centred.
        mean: of the patches.
        kernel: (kh, kw).
        count: patches that the moments stand on.
        ranks: most ranks that will be asked for.
    """
    outputs, width = len(weight), kernel[1]
    columns = weight.shape[1] // width  # C·kh
    second = covariance.reshape(columns, width, columns, width)
    by_column = weight.reshape(outputs, columns, width)
    values, vectors = scipy.linalg.eigh(np.einsum("ajbj->ab", second) / width)
    root = np.sqrt(np.clip(values, values[-1] * _SMALLEST, None))
    whitened = (root[:, None] * vectors.T) @ by_column.transpose(1, 0, 2).reshape(columns, outputs * width)
    directions = scipy.linalg.eigh(whitened @ whitened.T)[1][:, ::-1][:, :ranks]
    vertical = (directions.T / root) @ vectors.T  # reads a column's coordinates along the directions, unwhitened
    half = np.tensordot(vertical, second, axes=1)
    thin = len(vertical) * width
    features = np.tensordot(half, vertical, axes=([2], [1])).transpose(0, 1, 3, 2).reshape(thin, thin)
    cross = np.tensordot(half, by_column, axes=([2, 3], [1, 2])).reshape(thin, outputs)
    lower = _lower(features, max(_RIDGE * float(np.trace(features)) / thin, np.finfo(np.float64).tiny))
    coordinates = scipy.linalg.solve_triangular(lower, cross, lower=True)
    power = float(np.sum((weight @ covariance) * weight))
    return Separable(vertical, lower, coordinates, power, mean.reshape(columns, width), count)


def _lower(features: Array, ridge: float) -> Array:
    """Lower Cholesky factor with a ridge, a larger one where rounding has left less than positive definite.

    Raises:
        ValueError: features that no ridge helps.
    """
    for _ in range(8):
        try:
            return np.asarray(scipy.linalg.cholesky(features + ridge * np.eye(len(features)), lower=True))
        except scipy.linalg.LinAlgError:
            ridge *= 100
    raise ValueError("its second moments are not positive definite")
