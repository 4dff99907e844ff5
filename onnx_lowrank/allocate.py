"""Which site gets which rank: pure functions over exact errors and measured milliseconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from onnx_lowrank.plan import Decision
from onnx_lowrank.sites import Why


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One kind at one rank for one site: exact relative error, measured milliseconds of the fragment."""

    kind: str
    rank: int
    error: float
    ms: float


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a site can become. `dense` is the undecided decision; every candidate was measured faster than it."""

    dense: Decision
    candidates: tuple[Candidate, ...]


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

    Below two tiles the grid is fine (powers of two and their middles). The ranks between two multiples show
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


def decide(choices: Choices, level: float) -> Decision:
    """The fastest candidate whose error stays within `level`; dense with a reason when there is none."""
    if choices.dense.why is not None:
        return choices.dense
    if not choices.candidates:
        return choices.dense.keep(Why.NOT_FASTER)
    within = [c for c in choices.candidates if c.error <= level]
    if not within:
        return choices.dense.keep(Why.LOSS)
    best = min(within, key=lambda c: (c.ms, c.error, c.kind, c.rank))
    return dataclasses.replace(
        choices.dense, kind=best.kind, rank=best.rank, why=None, ms_after=best.ms, error=best.error
    )


def decide_all(choices: Sequence[Choices], level: float) -> tuple[Decision, ...]:
    """`decide` for every site at one common level."""
    return tuple(decide(c, level) for c in choices)


def bisect_level(
    measured_loss: Callable[[float], float], limit: float, *, low: float = 1e-7, high: float = 0.5, rounds: int = 9
) -> float | None:
    """Largest level (within a factor) whose *measured* loss stays within `limit`; None when even `low` exceeds it.

    The search is geometric, starts at `limit` itself, and every answer was measured, never extrapolated.
    """
    best: float | None = None
    level = limit
    for _ in range(rounds):
        loss = measured_loss(level)
        if loss <= limit:
            best, low = level, level
            if loss > 0.95 * limit or level >= high:
                break
        else:
            high = level
        # The loss grows about linearly with the level: aim straight, but stay inside the bracket.
        aim = level * min(max(limit / loss, 0.02), 8.0) * 0.98 if loss > 0 else level * 8
        level = aim if low < aim < high else (low * high) ** 0.5
        if best is not None and high / low < 1.03:
            break
    return best
