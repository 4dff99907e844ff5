"""Ways to choose ranks: the knapsack, and baselines from the literature over the same tables.

A policy is a function from the choices of all sites to plans, mild ones first; the search then finds the last one
whose measured loss holds. Baselines see every timed rank, also those that are not faster; pure functions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from onnx_lowrank.allocate import Candidate, Choices, Plans, frontier, predicted_loss
from onnx_lowrank.linalg import Array, evb_rank
from onnx_lowrank.plan import Decision
from onnx_lowrank.sites import Why

Spectra = Mapping[str, Array]
"""Singular values of the bare weight, descending, by node."""

Policy = Callable[[Sequence[Choices], Callable[[], Spectra]], Plans]

_LEVELS = 60
_CLASSIC = ("svd", "conv_svd")  # one rank a site, which is what the baselines choose (the seed's Tucker has two)
_LEAST = 32  # outputs and inputs: one ratio or threshold for all would ruin the tiny heads that papers leave out


def knapsack(choices: Sequence[Choices], spectra: Callable[[], Spectra]) -> Plans:
    """Least estimated loss per measured millisecond, over all kinds and sites (ALGORITHMS §4)."""
    del spectra
    return frontier(choices)


def flops(choices: Sequence[Choices], spectra: Callable[[], Spectra]) -> Plans:
    """BALF (arXiv 2509.25136): the same knapsack with multiply-adds for cost; every kind and rank, faster or not."""
    del spectra
    return frontier([Choices(c.dense, c.timed, c.timed, c.macs, c.weights) for c in choices], "macs")


def uniform(choices: Sequence[Choices], spectra: Callable[[], Spectra]) -> Plans:
    """One fraction of the weights kept at every site."""
    del spectra
    return _levels(choices, lambda c, keep: _largest(c, lambda k: k.weights <= keep * c.weights), _ratios())


def energy(choices: Sequence[Choices], spectra: Callable[[], Spectra]) -> Plans:
    """One fraction of the output's variance kept at every site: the smallest rank that does (arXiv 1505.06798)."""
    del spectra
    lost = np.geomspace(1e-6, 0.5, _LEVELS)
    return _levels(choices, lambda c, level: _smallest(c, lambda k: k.error <= level), lost)


def welore(choices: Sequence[Choices], spectra: Callable[[], Spectra]) -> Plans:
    """WeLore (arXiv 2407.11239): one threshold on all singular values, each spectrum scaled to [0, 1]; no data."""
    known = spectra()

    def scaled(node: str) -> Array:
        values = known[node]
        return np.asarray((values - values.min()) / max(float(values.max() - values.min()), 1e-300))

    def pick(choice: Choices, level: float) -> Candidate | None:
        above = int(np.sum(scaled(choice.dense.node) >= level))
        return _nearest(choice, above)

    return _levels(choices, pick, np.linspace(0.0, 1.0, _LEVELS))


def vbmf(choices: Sequence[Choices], spectra: Callable[[], Spectra]) -> Plans:
    """Kim et al. 2015 (arXiv 1511.06530): the rank of each weight by empirical variational Bayes; one plan, no data."""
    known = spectra()
    ranks = {c.dense.node: evb_rank(known[c.dense.node], max(c.dense.shape)) for c in choices if c.timed}
    return _levels(choices, lambda c, _: _nearest(c, ranks[c.dense.node]), [0.0])


def greedy(choices: Sequence[Choices], spectra: Callable[[], Spectra]) -> Plans:
    """AIMET's greedy selection (arXiv 1912.09802): every site alone as small as one common score level allows.

    The score is the estimated loss of the site here.
    """
    del spectra

    def pick(choice: Choices, level: float) -> Candidate | None:
        allowed = [k for k in _classic(choice) if k.loss <= level and k.macs < choice.macs]
        return min(allowed, key=lambda k: (k.macs, k.kind, k.rank), default=None)

    return _levels(choices, pick, np.geomspace(1e-7, 1.0, _LEVELS))


def staircase(choices: Sequence[Choices], spectra: Callable[[], Spectra]) -> Plans:
    """The seed's Algorithm 1 (arXiv 2407.20266): from the rank of compression α down to that of α + 1, the first rank
    behind the largest drop in latency, `max t(r) − t(r−1)`; dense where that is not faster. No accuracy term.

    Here over the ranks that were timed, which lie closer where the curve is steep, for every α in turn.
    """
    del spectra

    def pick(choice: Choices, keep: float) -> Candidate | None:
        alpha = 1 / keep
        window = sorted(
            (k for k in _classic(choice) if choice.weights / (alpha + 1) <= k.weights <= choice.weights / alpha),
            key=lambda k: k.rank,
        )
        if not window:
            return None
        drops = [(b.ms - a.ms, a) for a, b in itertools.pairwise(window)]
        best = max(drops, key=lambda d: (d[0], d[1].rank))[1] if drops else window[0]
        return best if best.ms < choice.cost("ms") else None

    return _levels(choices, pick, _ratios())


def _ratios() -> list[float]:
    return [float(keep) for keep in np.linspace(0.99, 0.02, _LEVELS)]


def _levels(
    choices: Sequence[Choices], pick: Callable[[Choices, float], Candidate | None], levels: Sequence[float] | Array
) -> Plans:
    """One plan a level, doubles left out."""
    plans: dict[tuple[Decision, ...], float] = {}
    for level in levels:
        chosen = [_decision(choice, pick(choice, float(level)) if choice.timed else None) for choice in choices]
        if any(d.kind for d in chosen):
            plans.setdefault(tuple(chosen), predicted_loss(chosen))
    return [(loss, decisions) for decisions, loss in plans.items()]


def _decision(choice: Choices, candidate: Candidate | None) -> Decision:
    if candidate is None:
        return choice.dense if choice.dense.why is not None else choice.dense.keep(Why.LOSS)
    return choice.become(candidate)


def _classic(choice: Choices) -> tuple[Candidate, ...]:
    if min(choice.dense.shape) < _LEAST:
        return ()
    return tuple(k for k in choice.timed if k.kind in _CLASSIC)


def _largest(choice: Choices, holds: Callable[[Candidate], bool]) -> Candidate | None:
    return max((k for k in _classic(choice) if holds(k)), key=lambda k: k.rank, default=None)


def _smallest(choice: Choices, holds: Callable[[Candidate], bool]) -> Candidate | None:
    found = min((k for k in _classic(choice) if holds(k)), key=lambda k: k.rank, default=None)
    return found if found is not None and found.weights < choice.weights else None


def _nearest(choice: Choices, rank: int) -> Candidate | None:
    """The timed candidate whose rank is nearest; dense when the rank would not save a multiply-add."""
    smaller = [k for k in _classic(choice) if k.weights < choice.weights]
    if not smaller or rank > max(k.rank for k in smaller):
        return None
    return min(smaller, key=lambda k: (abs(math.log(k.rank / max(rank, 1))), k.rank))


POLICIES: Final[Mapping[str, Policy]] = {
    "knapsack": knapsack,
    "uniform": uniform,
    "energy": energy,
    "welore": welore,
    "vbmf": vbmf,
    "greedy": greedy,
    "staircase": staircase,
    "flops": flops,
}
