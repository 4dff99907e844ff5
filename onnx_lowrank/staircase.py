"""Latency as a staircase in the rank: which ranks to time, and which of them the hardware rewards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

TILE = 16
"""Channels of a block in the runtime's blocked layouts, and of a tensor-core tile; steps come at its multiples."""

_BEND = 0.08  # of the dense time: two neighbours further apart than this deserve a rank between them


def rank_grid(max_rank: int, points: int = 7) -> tuple[int, ...]:
    """Ranks worth timing first, up to `max_rank`: about `points` multiples of 16, and some between two of them.

    Below one tile the grid is fine. The ranks between two multiples show whether the hardware has steps at all;
    where it has, `right_edges` removes them.
    """
    if max_rank < 1:
        return ()
    fine = [r for r in (1, 2, 3, 4, 6, 8, 12) if r <= min(max_rank, TILE)]
    step = max(TILE, round(max_rank / points / TILE) * TILE)
    coarse = list(range(step, max_rank + 1, step))
    between = [r + TILE // 2 for r in coarse[::3] if r + TILE // 2 <= max_rank]
    last = [max_rank // TILE * TILE] if max_rank >= TILE else [max_rank]
    return tuple(sorted({*fine, *coarse, *between, *last}))


def right_edges(ms: Mapping[int, float], noise: float) -> dict[int, float]:
    """Keep the ranks at the right edge of each latency step (ALGORITHMS §3, rank quantisation).

    A rank goes when a larger one is as fast within `noise` (a fraction): more rank for the same time. What stays
    rises strictly with the rank. `ms` maps rank to milliseconds.
    """
    kept: dict[int, float] = {}
    fastest_above = float("inf")
    for rank in sorted(ms, reverse=True):
        if ms[rank] * (1 + noise) < fastest_above:
            kept[rank] = ms[rank]
            fastest_above = ms[rank]
    return dict(sorted(kept.items()))


def eligible(ms: Mapping[tuple[int, ...], float], noise: float) -> set[tuple[int, ...]]:
    """The sizes of one kind that may be chosen: those of one rank at right edges.

    Of several ranks, all but those that are no faster than one as large in every rank: which of two other pairs takes
    more multiply-adds, and so is behind the other one, only the geometry tells.

    Args:
        ms: milliseconds by ranks.
        noise: fraction within which two times are equal.
    """
    if all(len(size) == 1 for size in ms):
        return {(rank,) for rank in right_edges({size[0]: time for size, time in ms.items()}, noise)}

    def behind(size: tuple[int, ...]) -> bool:
        larger = (other for other in ms if other != size and all(a >= b for a, b in zip(other, size, strict=True)))
        return any(ms[other] <= ms[size] for other in larger)

    return {size for size in ms if not behind(size)}


def refine(ms: Mapping[int, float], dense: float, noise: float, allowed: Iterable[int]) -> tuple[int, ...]:
    """Ranks to time next: multiples of 16 where the curve rises steeply behind an edge.

    The step lies between the edge and the next larger multiple of 16 that is known to be slower; halving that
    interval again and again finds it, also where it is the step of a whole wave of tiles and all ranks of a wave are
    as fast as its last one.

    Args:
        ms: milliseconds by rank so far.
        dense: milliseconds of the dense weight; what is slower is not looked at.
        noise: fraction within which two times are equal.
        allowed: ranks that may be asked for.
    """
    edges = [(rank, time) for rank, time in right_edges(ms, noise).items() if time < dense]
    wanted, may = set(), set(allowed)
    for (low, fast), (high, slow) in itertools.pairwise(edges):
        slower = min((r for r in ms if low < r < high and r % TILE == 0), default=high)
        middle = (low + slower) // 2 // TILE * TILE
        if slow - fast > _BEND * dense and low < middle < slower and middle not in ms and middle in may:
            wanted.add(middle)
    return tuple(sorted(wanted))


def steps(ms: Mapping[int, float], noise: float) -> dict[str, object]:
    """The edges of a measured staircase and the multiple that they share: which ranks the hardware rewards.

    Args:
        ms: milliseconds by rank.
        noise: fraction within which two times are equal.

    Returns:
        `edges`: milliseconds by rank; `multiple`: greatest common divisor of the edges from one tile on that are a
        step (the next known rank is slower by more than twice the noise), None when fewer than two are;
        `flat`: the largest rank as fast as the smallest one, where launches decide and not the rank.
    """
    edges = right_edges(ms, noise)
    known = sorted(ms)
    stepped = [
        rank
        for rank in edges
        if rank >= TILE
        and any(ms[after] > ms[rank] * (1 + 2 * noise) for after in known if rank < after <= rank + TILE)
    ]
    first = min(known, default=0)
    flat = max((r for r in known if all(ms[k] <= ms[first] * (1 + noise) for k in known if k <= r)), default=0)
    multiple = math.gcd(*stepped) if len(stepped) > 1 else None
    return {"edges": edges, "multiple": multiple, "flat": flat}
