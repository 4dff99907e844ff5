"""One projection of an input for several sites that read it: the best in the sum of their own relative errors.

Stacked, the weights are one map `A x`, and ALGORITHMS §1 gives its best approximations `U_r U_rᵀ A` at every rank. The
right factor is common to the sites, and what is left of each site's weight is `W P_r` with `P = S Aᵀ U Σ⁻²`: so a
weight that a refit has moved can be projected as well as the original.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from onnx_lowrank.linalg import Array, Metric, factor_input

_LEAST = 1e-12  # of the largest value: a direction with less power has no left factor


@dataclasses.dataclass(frozen=True)
class Projection:
    """What sites that read one tensor have in common, at every rank.

    Attributes:
        read: R×K; its first r rows are the right factor.
        write: K×R; a weight N×K times its first r columns is the left factor.
        errors: relative error of each site's output in its metric by rank, sites × (R+1).
        mean: E[x], K.
    """

    read: Array
    write: Array
    errors: Array
    mean: Array

    def relative(self, site: int, rank: int) -> float:
        """Relative error of the output of one of the sites at a rank."""
        return float(self.errors[site, min(rank, self.errors.shape[1] - 1)])

    def left(self, weight: Array, rank: int) -> Array:
        """Left factor N×r of a weight N×K."""
        return weight @ self.write[:, :rank]

    def right(self, rank: int) -> Array:
        """The common right factor, r×K."""
        return self.read[:rank]


def projection(weights: Sequence[Array], metrics: Sequence[Metric | None], second: Array, mean: Array) -> Projection:
    """The best common projection of x: a site's error counts as the fraction of its output's power.

    Args:
        weights: of the sites, each N×K.
        metrics: of their outputs, None for the plain one.
        second: of x, K×K, centred where the means are corrected.
        mean: E[x], K.
    """
    weighted = [w if metric is None else metric.root @ w for w, metric in zip(weights, metrics, strict=True)]
    powers = np.array([np.einsum("ij,ij->", one @ second, one) for one in weighted])
    scales = np.where(powers > 0, powers, 1.0) ** -0.5
    stacked = np.concatenate([scale * one for scale, one in zip(scales, weighted, strict=True)])
    found = factor_input(stacked, second)
    ends = np.cumsum([len(one) for one in weighted])[:-1]
    shares = np.stack([np.sum(part**2, axis=0) for part in np.split(found.basis, ends)]) * found.values
    errors = np.concatenate([np.cumsum(shares[:, ::-1], axis=1)[:, ::-1], np.zeros((len(weights), 1))], axis=1)
    kept = found.values > _LEAST * max(float(found.values[0]), np.finfo(np.float64).tiny)
    inverse = np.where(kept, 1.0 / np.where(kept, found.values, 1.0), 0.0)
    return Projection(found.basis.T @ stacked, second @ stacked.T @ found.basis * inverse, errors, mean)
