"""Low-rank factorisation: closed forms, exact errors at every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Factorization:
    basis: Array
    values: Array
    total: float

    def error(self, rank: int) -> float:
        return float(self.values[rank:].sum())

    def relative(self, rank: int) -> float:
        return self.error(rank) / self.total if self.total > 0 else 0.0

    def pair(self, weight: Array, rank: int) -> tuple[Array, Array]:
        u = self.basis[:, :rank]
        return u, u.T @ weight


def factor_gram(gram: Array) -> Factorization:
    v, u = scipy.linalg.eigh(gram)
    v = np.clip(v[::-1], 0, None)
    return Factorization(u[:, ::-1], v, float(v.sum()))


def factor_input(weight: Array, second: Array) -> Factorization:
    v, q = scipy.linalg.eigh(second)
    d = (weight @ q) * np.sqrt(np.clip(v, 0, None))
    u, s, _ = scipy.linalg.svd(d, full_matrices=False)
    return Factorization(u, s**2, float((s**2).sum()))


def rank_revealing_rows(basis: Array, bound: float = 2.0) -> tuple[Any, Any, Array]:
    n, r = basis.shape
    _, _, p = scipy.linalg.qr(basis.T, pivoting=True, mode="economic")
    piv, rest = p[:r].copy(), p[r:].copy()
    c = np.linalg.solve(basis[piv].T, basis[rest].T).T
    while c.size and np.abs(c).max() > bound:
        i, j = np.unravel_index(np.abs(c).argmax(), c.shape)
        piv[j], rest[i] = rest[i], piv[j]
        c = np.linalg.solve(basis[piv].T, basis[rest].T).T
    return piv, rest, c


def correct_bias(left: Array, bias: Array, output_mean: Array) -> Array:
    d = output_mean - bias
    return bias + d - left @ (left.T @ d)
