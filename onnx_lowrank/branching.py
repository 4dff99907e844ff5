"""A nested approximation of a convolution whose core is block-diagonal (ALGORITHMS §2: `branch`), in the data's metric.

`y ≈ Σ_g L_g C_g (A_g ⊗ I_w) x`: a sum of g small Tucker terms (block terms; De Lathauwer 2008). Which channels belong
together is found with them: every `A_g` mixes the filters of a nested fit, the first factor of `tucker`. All of it
happens in the space of those filters' thin features, so that no moment of patches is needed, and a fit is cheap.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import scipy.linalg

from onnx_lowrank.alternating import Square, alternated, best_second, descended, thin_moments
from onnx_lowrank.linalg import Array
from onnx_lowrank.separable import Separable, first_filters

_SWEEPS, _ROUNDS, _STEPS = 6, 3, 4
_RIDGE = 1e-7  # of the mean variance of what the last factor reads


@dataclass(frozen=True)
class Branched:
    """Three factors, the middle one of g groups.

    Attributes:
        first: s×(K/w), the filters of a group side by side.
        core: r×(s/g·w), row i reads the filters of its own group.
        last: N×r.
        relative: error as a fraction of the output's power, corrected as that of the nested fit.
        computed: mean of what they compute, N, without any bias.
    """

    first: Array
    core: Array
    last: Array
    relative: float
    computed: Array


_KNOWN: WeakKeyDictionary[Separable, dict[tuple[int, int, int, int], Branched]] = WeakKeyDictionary()


def branched(known: Separable, rank: int, inner: int, groups: int, filters: int) -> Branched:
    """The best that alternating finds for g terms of ranks (s/g, r/g); found once for every nested fit and size.

    Args:
        known: the nested fit of the channels.
        rank: r, a multiple of g.
        inner: s, a multiple of g.
        groups: g.
        filters: how many of the nested fit's filters are mixed, at least s.
    """
    fits, size = _KNOWN.setdefault(known, {}), (rank, inner, groups, filters)
    if size not in fits:
        fits[size] = _fitted(known, *size)
    return fits[size]


def spread(core: Array, groups: int) -> Array:
    """A core r×(s/g·w) as r×(s·w), zero outside of its blocks."""
    return np.asarray(scipy.linalg.block_diag(*core.reshape(groups, len(core) // groups, -1)))


def _fitted(known: Separable, rank: int, inner: int, groups: int, filters: int) -> Branched:
    width = known.mean.shape[1]
    lower = known.lower[: filters * width, : filters * width]
    cross = known.coordinates[: filters * width]
    weight = np.asarray(scipy.linalg.solve_triangular(lower, cross, trans="T", lower=True).T)
    covariance = lower @ lower.T
    mixing, second = one_by_one(weight, covariance, width, inner, rank, groups)
    mixing, core, last = together(weight, covariance, width, mixing, second, rank, groups)
    made = np.einsum("nrj,rc->ncj", (last @ core).reshape(len(last), inner, width), mixing, optimize=True)
    gone = weight - made.reshape(weight.shape)
    explained = float(np.sum(cross**2) - np.sum((gone @ covariance) * gone))
    first = mixing @ known.vertical[:filters]
    blocks = core.reshape(groups, rank // groups, groups, -1)
    own = np.concatenate([blocks[group, :, group] for group in range(groups)])
    return Branched(
        first, own, last, known.corrected(explained, inner), last @ (core @ (first @ known.mean).reshape(-1))
    )


def one_by_one(weight: Array, covariance: Array, width: int, inner: int, rank: int, groups: int) -> tuple[Array, Array]:
    """Each term fitted to what those before it leave: first factors s×(K/w), and N×(s·w) that reads their features."""
    square = covariance.reshape(-1, width, weight.shape[1] // width, width).astype(np.float32)
    rest, firsts, seconds = weight, [], []
    for _ in range(groups):
        start = first_filters(rest, covariance, width)[: inner // groups]
        first = alternated(rest, covariance, start, width, rank // groups, sweeps=1)
        target = (rest @ covariance).reshape(len(rest), -1, width)
        second = best_second(first, square, target, rank // groups)
        made = np.einsum("nrj,rc->ncj", second.reshape(len(rest), -1, width), first, optimize=True)
        rest = rest - made.reshape(rest.shape)
        firsts.append(first)
        seconds.append(second)
    return np.concatenate(firsts), np.concatenate(seconds, axis=1)


def together(
    weight: Array, covariance: Array, width: int, first: Array, second: Array, rank: int, groups: int
) -> tuple[Array, Array, Array]:
    """All terms improved in turn: first s×(K/w), core r×(s·w) with zeros outside of its blocks, last N×r."""
    square: Square = covariance.reshape(-1, width, weight.shape[1] // width, width).astype(np.float32)
    target, thin = (weight @ covariance).reshape(len(weight), -1, width), len(first)
    for _ in range(_SWEEPS):
        core, last = in_turn(*thin_moments(first, square, target), second, rank, groups)
        second = last @ core
        by_filter = second.reshape(len(weight), thin, width)
        wanted = np.einsum("rjcj->rc", np.tensordot(by_filter, target, axes=([0], [0])))
        first = descended(first, wanted, (second.T @ second).reshape(thin, width, thin, width), square, _STEPS)
    core, last = in_turn(*thin_moments(first, square, target), second, rank, groups)
    return first, core, last


def in_turn(gram: Array, cross: Array, second: Array, rank: int, groups: int) -> tuple[Array, Array]:
    """Core and last factor for given thin features: each term by reduced-rank regression on what the others leave.

    Args:
        gram: E[zzᵀ] of the features, (s·w)².
        cross: E[zyᵀ], (s·w)×N.
        second: N×(s·w) to start from.
        rank: r.
        groups: g.
    """
    size, thin = len(gram) // groups, rank // groups
    second, core = second.copy(), np.zeros((rank, len(gram)))
    for _ in range(_ROUNDS):
        for group in range(groups):
            block = slice(group * size, (group + 1) * size)
            rest = cross[block] - gram[block] @ second.T + gram[block, block] @ second[:, block].T
            full = scipy.linalg.solve(gram[block, block], rest, assume_a="pos").T
            basis = scipy.linalg.eigh(full @ rest)[1][:, -thin:]
            core[group * thin : (group + 1) * thin, block] = basis.T @ full
            second[:, block] = basis @ (basis.T @ full)
    small = core @ gram @ core.T
    small.flat[:: rank + 1] += max(_RIDGE * float(np.trace(small)) / rank, np.finfo(np.float64).tiny)
    return core, np.asarray(scipy.linalg.solve(small, core @ cross, assume_a="pos").T)
