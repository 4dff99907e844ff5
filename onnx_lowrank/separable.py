"""Nested approximation of a convolution in the metric of the data: a first factor that reads part of a patch's entries
alike, and a second one on what it gives (ALGORITHMS §2: `spatial`, `asym3d`, `tucker`).

A patch is a matrix (K/w)×w: (C·kh)×kw where the first factor is a kh×1 convolution, C×(kh·kw) where it is 1×1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from onnx_lowrank.linalg import Array, Factorization, factor_gram, signed

_RIDGE = 1e-7  # of the mean variance of the first filter's features
_SMALLEST = 1e-9  # of the largest variance: directions below are noise of the accumulation


@dataclass(frozen=True, eq=False)
class Separable:
    """Best second factors for nested first factors, at every rank from one decomposition.

    With `A_r` the first r filters, the thin features of a patch are `z = (A_r ⊗ I_w) x`, and the second factor is
    the least squares solution `B = E[yzᵀ] E[zzᵀ]⁻¹` for the centred output y. The features of rank r are the first r·w
    of those of rank R, so with `E[zzᵀ] = LLᵀ` the error at *every* rank is what the leading rows of `T = L⁻¹ E[zyᵀ]`
    leave of the output's power. `T_rᵀT_r` is the second moment of what rank r computes, so that its eigenvalues
    give the error when the second factor has a low rank itself (reduced-rank regression).

    Attributes:
        vertical: A, R×(K/w), the most important filter first.
        lower: L, (R·w)², of the features' covariance with a small ridge.
        coordinates: T, (R·w)×N.
        total: E‖y‖².
        mean: E[x] as (K/w)×w.
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
        return self.corrected(float(np.sum(self.coordinates[: rank * self.mean.shape[1]] ** 2)), rank)

    def corrected(self, explained: float, rank: int) -> float:
        """Relative error of what explains so much with the features of a rank, corrected for few patches."""
        if self.total <= 0:
            return 0.0
        used = rank * self.mean.shape[1]
        error = max(1.0 - explained / self.total, 0.0)
        free = self.count - used
        return min(error * self.count / free, 1.0) if free > 0 else 1.0

    def errors(self, ranks: Sequence[int], outer: Sequence[int]) -> Array:
        """Relative errors when the second factor of every rank has a rank itself: ranks × outer ranks."""
        width, gram, done = self.mean.shape[1], np.zeros((self.coordinates.shape[1],) * 2), 0
        found = np.ones((len(ranks), len(outer)))
        for row, rank in sorted(enumerate(ranks), key=lambda pair: pair[1]):
            fresh = self.coordinates[done * width : rank * width]
            gram, done = gram + fresh.T @ fresh, rank
            explained = np.cumsum(scipy.linalg.eigvalsh(gram)[::-1])
            found[row] = [self.corrected(float(explained[min(r, len(explained)) - 1]), rank) for r in outer]
        return found

    def spectrum(self, rank: int) -> Factorization:
        """The spectrum of what a rank computes: its second factor is best approximated by the leading directions."""
        used = self.coordinates[: rank * self.mean.shape[1]]
        return factor_gram(used.T @ used)

    def factors(self, rank: int) -> tuple[Array, Array, Array]:
        """First factor r×(K/w), second N×(r·w), and the mean of what they compute (N) without any bias."""
        used = rank * self.mean.shape[1]
        second = scipy.linalg.solve_triangular(
            self.lower[:used, :used], self.coordinates[:used], trans="T", lower=True
        ).T
        thin = (self.vertical[:rank] @ self.mean).reshape(-1)
        return self.vertical[:rank], second, second @ thin


def separable(weight: Array, covariance: Array, mean: Array, width: int, count: int, ranks: int) -> Separable:
    """First filters from the weight whitened by the data, second factors by least squares.

    Args:
        weight: N×K.
        covariance: of the patches, centred.
        mean: of the patches.
        width: w.
        count: patches that the moments stand on.
        ranks: most ranks that will be asked for.
    """
    first = first_filters(weight, covariance, width)[:ranks]
    return nested_least_squares(weight, covariance, mean, width, count, first)


def first_filters(weight: Array, covariance: Array, width: int) -> Array:
    """All first filters, (K/w)×(K/w), the most important one first; arguments as of `separable`.

    The SVD of W as (K/w)×(N·w) (Jaderberg et al. 2014; for channels the HOSVD of Kim et al. 2015) in the metric of the
    mean covariance of a patch's w columns; what it neglects, the correlation between columns, the least squares fit of
    the second factor takes in.
    """
    outputs, columns = len(weight), weight.shape[1] // width
    second = covariance.reshape(columns, width, columns, width)
    by_column = weight.reshape(outputs, columns, width)
    values, vectors = scipy.linalg.eigh(np.einsum("ajbj->ab", second) / width)
    root = np.sqrt(np.clip(values, values[-1] * _SMALLEST, None))
    whitened = (root[:, None] * vectors.T) @ by_column.transpose(1, 0, 2).reshape(columns, outputs * width)
    directions = signed(scipy.linalg.eigh(whitened @ whitened.T)[1])[:, ::-1]
    # They read a column's coordinates along the directions, unwhitened.
    return np.asarray((directions.T / root) @ vectors.T)


def nested_least_squares(
    weight: Array, covariance: Array, mean: Array, width: int, count: int, first: Array
) -> Separable:
    """The best second factors of given first ones (R×(K/w)); other arguments as of `separable`."""
    outputs, (most, columns) = len(weight), first.shape
    second = covariance.reshape(columns, width, columns, width)
    half = np.tensordot(first, second, axes=1)
    thin = most * width
    features = np.tensordot(half, first, axes=([2], [1])).transpose(0, 1, 3, 2).reshape(thin, thin)
    cross = np.tensordot(half, weight.reshape(outputs, columns, width), axes=([2, 3], [1, 2])).reshape(thin, outputs)
    # Of the first filter alone: what is fitted at a rank must not depend on how many more were asked for.
    spread = float(np.trace(features[:width, :width])) / width
    lower = _lower(features, max(_RIDGE * spread, np.finfo(np.float64).tiny))
    coordinates = scipy.linalg.solve_triangular(lower, cross, lower=True)
    power = float(np.sum((weight @ covariance) * weight))
    return Separable(first, lower, coordinates, power, mean.reshape(columns, width), count)


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
