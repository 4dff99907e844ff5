"""Which site gets which rank: pure functions over exact errors and measured milliseconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from onnx_lowrank.plan import Decision
from onnx_lowrank.sites import Why


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One kind at one rank for one site.

    `error` is the exact relative error of the site's own output, `ms` the measured time of the fragment, `loss` the
    estimated loss of the model's outputs: `error` times the site's sensitivity.
    """

    kind: str
    rank: int
    error: float
    ms: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a site can become. `dense` is the undecided decision; every candidate was measured faster than it."""

    dense: Decision
    candidates: tuple[Candidate, ...]

    def weighted(self, sensitivity: float) -> Choices:
        """The same candidates with their loss estimated as `sensitivity · error` (ALGORITHMS §4)."""
        return Choices(self.dense, tuple(dataclasses.replace(c, loss=sensitivity * c.error) for c in self.candidates))


def right_edges(ms: dict[int, float], noise: float) -> dict[int, float]:
    """Keep the ranks at the right edge of each latency step (ALGORITHMS §3, rank quantisation).

    A rank goes when a larger one is as fast within `noise` (a fraction): more rank for the same time.
    `ms` maps rank to milliseconds.
    """
    kept: dict[int, float] = {}
    fastest_above = float("inf")
    for rank in sorted(ms, reverse=True):
        if ms[rank] * (1 + noise) < fastest_above:
            kept[rank] = ms[rank]
            fastest_above = ms[rank]
    return dict(sorted(kept.items()))


def rank_grid(max_rank: int, points: int = 10, tile: int = 16) -> tuple[int, ...]:
    """Ranks worth timing up to `max_rank`: about `points` multiples of `tile`, and one between two of them.

    Below one tile the grid is fine. The ranks between two multiples show
    whether the hardware has steps at all; where it has, `right_edges` removes them.
    """
    if max_rank < 1:
        return ()
    fine = [r for r in (1, 2, 3, 4, 6, 8, 12) if r <= min(max_rank, tile)]
    step = max(tile, round(max_rank / points / tile) * tile)
    coarse = list(range(step, max_rank + 1, step))
    between = [r + tile // 2 for r in coarse[::3] if r + tile // 2 <= max_rank]
    last = [max_rank // tile * tile] if max_rank >= tile else [max_rank]
    return tuple(sorted({*fine, *coarse, *between, *last}))


def decide(choices: Choices, level: float, total_ms: float) -> Decision:
    """What one site becomes at a common level: the output loss that is paid for the whole of `total_ms`.

    A candidate that saves a share of `total_ms` is worth `level · share` of loss; the best bargain wins, dense with
    a reason when there is none. (The Lagrangian form of the knapsack, ALGORITHMS §4.)
    """
    dense = choices.dense
    if dense.why is not None:
        return dense
    if not choices.candidates:
        return dense.keep(Why.NOT_FASTER)

    def bargain(candidate: Candidate) -> float:
        return level * ((dense.ms_before or 0.0) - candidate.ms) / total_ms - candidate.loss

    best = max(choices.candidates, key=lambda c: (bargain(c), -c.ms, c.kind, c.rank))
    if bargain(best) <= 0:
        return dense.keep(Why.LOSS)
    return dataclasses.replace(dense, kind=best.kind, rank=best.rank, ms_after=best.ms, error=best.error)


def decide_all(choices: Sequence[Choices], level: float) -> tuple[Decision, ...]:
    """`decide` for every site at one common level."""
    total = sum(c.dense.ms_before or 0.0 for c in choices) or 1.0
    return tuple(decide(c, level, total) for c in choices)


def frontier(choices: Sequence[Choices]) -> list[tuple[float, tuple[Decision, ...]]]:
    """The distinct plans from cheap to costly loss, each with its predicted loss (sum over the sites)."""
    losses = {(c.dense.node, k.kind, k.rank): k.loss for c in choices for k in c.candidates}
    found: dict[tuple[Decision, ...], float] = {}
    for step in range(-320, 81):
        decisions = decide_all(choices, 10.0 ** (step / 40))
        found[decisions] = sum(losses[(d.node, d.kind, d.rank)] for d in decisions if d.kind and d.rank)
    return [(loss, decisions) for decisions, loss in found.items() if any(d.kind for d in decisions)]


def search(
    plans: Sequence[tuple[float, tuple[Decision, ...]]],
    measured_loss: Callable[[tuple[Decision, ...]], float],
    limit: float,
    *,
    rounds: int = 10,
) -> tuple[Decision, ...] | None:
    """The furthest plan whose *measured* loss stays within `limit`; None when none was found to.

    The additive model proposes, built models answer, and every answer corrects the model's scale. A proposal
    outside the bracket of what was measured becomes the middle of the bracket.
    """
    holds, fails, scale = -1, len(plans), 1.0
    for _ in range(rounds):
        if fails - holds <= 1:
            break
        proposed = sum(predicted * scale <= limit for predicted, _ in plans) - 1
        step = proposed if holds < proposed < fails else (holds + fails) // 2
        predicted, decisions = plans[step]
        loss = measured_loss(decisions)
        if loss <= limit:
            holds = step
        else:
            fails = step
        if 0.97 * limit <= loss <= limit:
            break
        scale = loss / predicted if predicted > 0 and 0 < loss < float("inf") else scale
    return plans[holds][1] if holds >= 0 else None
