"""Low-rank factorisation of linear maps: closed forms, and the exact error at every rank (ALGORITHMS §1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.optimize

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Factorization:
    """The best approximations of `y = W x` at every rank, from one decomposition.

    The minimiser of `E‖Wx − Ŵx‖²` at rank r is `Ŵ = U_r U_rᵀ W`, with U the left singular vectors of `W S^½`
    (SVD-LLM V2, arXiv 2503.12340; Eckart–Young in the metric of the data).

    Attributes:
        basis: U, N×R, orthonormal columns, largest variance first.
        values: R squared singular values of `W S^½`, descending, not negative.
        total: their sum, `tr(W S Wᵀ)`, the output's power.
    """

    basis: Array
    values: Array
    total: float

    def error(self, rank: int) -> float:
        """`E‖Wx − Ŵx‖²` at a rank: the sum of the values left out."""
        return float(self.values[rank:].sum())

    def relative(self, rank: int) -> float:
        """`error` as a fraction of the output's power; 0 where there is no power."""
        return self.error(rank) / self.total if self.total > 0 else 0.0

    def pair(self, weight: Array, rank: int) -> tuple[Array, Array]:
        """Factors of `Ŵ`: left N×r with orthonormal columns, right r×K. `weight` is N×K."""
        left = self.basis[:, :rank]
        return left, left.T @ weight


@dataclass(frozen=True)
class Metric:
    """A metric `eᵀ M e` of errors e of an output: root `M^½` and its inverse, N×N, symmetric."""

    root: Array
    inverse: Array

    @classmethod
    def of(cls, matrix: Array, ridge: float) -> Metric:
        """The metric of a positive semidefinite matrix, with a ridge that is a fraction of its mean diagonal."""
        count = len(matrix)
        values, vectors = scipy.linalg.eigh(matrix)
        mean = max(float(values.sum()) / count, np.finfo(np.float64).tiny)
        root = np.sqrt(np.clip(values / mean, 0.0, None) + ridge)
        return cls((vectors * root) @ vectors.T, (vectors / root) @ vectors.T)


def effective_rank(second: Array) -> float:
    """How many directions a second moment spreads over: e to the entropy of its eigenvalues (Roy and Vetterli 2007).

    As many as it has rows where it is a multiple of the identity, none where it is zero.

    Args:
        second: positive semidefinite.
    """
    values = np.clip(scipy.linalg.eigvalsh(second), 0.0, None)
    total = float(values.sum())
    if total <= 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))


def factor_gram(gram: Array) -> Factorization:
    """Gram form: eigenvectors of the output's second moment `W S Wᵀ` (N×N). Needs no inverse and no input moments."""
    values, vectors = scipy.linalg.eigh(gram)
    clipped = np.clip(values[::-1], 0.0, None)
    return Factorization(np.ascontiguousarray(signed(vectors)[:, ::-1]), clipped, float(clipped.sum()))


def signed(vectors: Array) -> Array:
    """Columns with their largest entry positive: which of two signs comes out must not hang on the last bit."""
    largest = np.abs(vectors).argmax(axis=0)
    return vectors * np.where(np.take_along_axis(vectors, largest[None], axis=0) < 0, -1.0, 1.0)


def factor_groups(grams: Sequence[Array]) -> Factorization:
    """Gram form of g maps side by side that share one rank: the bases one above the other, the values added up.

    Args:
        grams: second moment of each map's output, all of one size (N/g)².

    Returns:
        basis N×(N/g): the columns of each N/g rows are orthonormal.
    """
    found = [factor_gram(gram) for gram in grams]
    values = np.asarray(np.sum([one.values for one in found], axis=0))
    return Factorization(np.concatenate([one.basis for one in found]), values, float(values.sum()))


def grouped_product(left: Array, right: Array, groups: int) -> Array:
    """The map that two factors of g groups compute, row by row: left N×r, right (g·r)×K, product N×K."""
    by_group = left.reshape(groups, -1, left.shape[1]) @ right.reshape(groups, left.shape[1], -1)
    return by_group.reshape(len(left), -1)


def factor_input(weight: Array, second: Array) -> Factorization:
    """eigh form: `S = QΛQᵀ`, singular vectors of `W Q Λ^½`. For N > K; works when S (K×K) is singular.

    `weight` is N×K. Never Cholesky: it fails or loses accuracy on near-singular S.
    """
    values, vectors = scipy.linalg.eigh(second)
    scaled = weight @ vectors
    del vectors  # what follows works in several matrices of this size
    scaled *= np.sqrt(np.clip(values, 0.0, None))
    scaled = np.asfortranarray(scaled)  # as LAPACK wants it: no copy
    basis, singular, _ = scipy.linalg.svd(scaled, full_matrices=False, overwrite_a=True)
    squared = singular**2
    return Factorization(signed(basis), squared, float(squared.sum()))


def end_pivots(basis: Array) -> tuple[slice, slice, Array]:
    """Write all rows of a basis as combinations of its first r rows, or of its last r where that needs smaller ones.

    Args:
        basis: N×r, full column rank.

    Returns:
        pivots and the other rows, as slices, and coefficients C (N−r)×r with `basis[rest] = C basis[pivots]`.
        Where the pivots are singular, C is huge.
    """
    count, rank = basis.shape
    ends = ((slice(0, rank), slice(rank, count)), (slice(count - rank, count), slice(0, count - rank)))
    found = [(pivots, rest, _solved(basis[pivots], basis[rest])) for pivots, rest in ends]
    return min(found, key=lambda one: float(np.abs(one[2]).max(initial=0.0)))


def common_pivots(bases: Sequence[Array]) -> tuple[int, slice, tuple[Array, ...]]:
    """Write the rows of several bases as combinations of the first r or the last r rows of one of them.

    Args:
        bases: each N×r, one of them at least with N ≥ r; together of full column rank.

    Returns:
        the basis that has the pivots, the pivots as a slice of its rows, and coefficients for every basis: of all its
        rows, of the owner's only those that are no pivots. The choice is the one with the smallest coefficients.
    """
    rank = bases[0].shape[1]
    found = []
    for owner, basis in enumerate(bases):
        count = len(basis)
        for pivots in (slice(0, rank), slice(count - rank, count)) if count >= rank else ():
            rest = [np.delete(other, pivots, axis=0) if i == owner else other for i, other in enumerate(bases)]
            combined = tuple(_solved(basis[pivots], rows) for rows in rest)
            found.append((owner, pivots, combined))
    return min(found, key=lambda one: max(float(np.abs(c).max(initial=0.0)) for c in one[2]))


def _solved(pivots: Array, rows: Array) -> Array:
    """C with `rows = C pivots`; huge where the pivots are singular, so that they are not taken."""
    try:
        return np.asarray(np.linalg.solve(pivots.T, rows.T).T, np.float64)
    except np.linalg.LinAlgError:
        shift = float(np.finfo(np.float64).eps * (np.linalg.norm(pivots) or 1.0))
        return np.asarray(np.linalg.solve(pivots.T + shift * np.eye(len(pivots)), rows.T).T, np.float64)


def correct_bias(left: Array, read: Array, linear_mean: Array, output_mean: Array) -> Array:
    """Bias that keeps the mean of the output: `m − left read Wμ`, where `left read` projects the output.

    Args:
        left: N×r.
        read: r×N.
        linear_mean: Wμ, N.
        output_mean: m, N; `Wμ + b` where the site's own output is the target.
    """
    return output_mean - left @ (read @ linear_mean)


def evb_rank(singular: Array, larger: int) -> int:
    """Rank by empirical variational Bayes: singular values that stand out of the noise that explains the rest best.

    The analytic solution of Nakajima et al. 2013 ("Global analytic solution of fully-observed variational Bayesian
    matrix factorization", theorem 2 and corollary 2), as Kim et al. 2015 use it to choose ranks.

    Args:
        singular: all singular values of an L×M matrix, L ≤ M.
        larger: M.
    """
    squared = np.sort(np.asarray(singular, np.float64) ** 2)[::-1]
    smaller = len(squared)
    if smaller == 0 or squared[0] <= 0:
        return 0
    alpha = smaller / larger
    least = 2.5129 * np.sqrt(alpha)
    threshold = (1 + least) * (1 + alpha / least)
    most = max(min(int(np.ceil(smaller / (1 + alpha))) - 1, smaller - 1), 0)
    upper = squared.sum() / (smaller * larger)
    lower = max(squared[most] / (larger * threshold), squared[most:].mean() / larger, 1e-12 * upper)

    def free_energy(noise: float) -> float:
        x = squared / (larger * noise)
        signal = x[x > threshold]
        t = 0.5 * (signal - (1 + alpha) + np.sqrt((signal - (1 + alpha)) ** 2 - 4 * alpha))
        shrunk = np.log(t + 1) + alpha * np.log(t / alpha + 1) - t
        return float(np.sum(x - np.log(np.maximum(x, 1e-300))) + np.sum(shrunk))

    if lower >= upper:
        return int(np.sum(squared > larger * upper * threshold))
    found = scipy.optimize.minimize_scalar(free_energy, bounds=(lower, upper), method="bounded")
    return int(np.sum(squared > larger * float(found.x) * threshold))


def half_of(symmetric: Array) -> Array:
    """The upper triangle of a symmetric matrix (K×K), row by row: K(K+1)/2 numbers."""
    return np.concatenate([row[i:] for i, row in enumerate(symmetric)])


def from_half(half: Array, width: int) -> Array:
    """The symmetric matrix (K×K) whose upper triangle this is."""
    whole, start = np.empty((width, width)), 0
    for i in range(width):
        row = half[start : start + width - i]
        whole[i, i:], whole[i:, i], start = row, row, start + len(row)
    return whole
