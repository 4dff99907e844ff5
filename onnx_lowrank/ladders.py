"""Sizes worth timing: pairs of ranks for kinds that have two, and which sizes can compete at all. Pure functions.

Timing is the slowest stage, and the error at every size is known before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from onnx_lowrank.linalg import Array
from onnx_lowrank.staircase import TILE

_RUNGS = 10
LARGEST = 0.2
"""Error above which a pair of ranks is not timed: it takes many sites to spend so much, and rungs are few."""
_AXIS = 16  # values of each rank that are looked at


@dataclasses.dataclass(frozen=True)
class Entry:
    """A size of a kind, with multiply-adds per position and the relative error of the site's output."""

    kind: str
    rank: int
    inner: int
    macs: int
    error: float
    ranks: int = 1


def axis(most: int) -> tuple[int, ...]:
    """Values of one of two ranks, at most about 16 of them: whole tiles, and small ones below a tile."""
    if most < TILE:
        return tuple(r for r in (2, 4, 8, 12) if r <= most)
    step = max(TILE, math.ceil(most / _AXIS / TILE) * TILE)
    return tuple(dict.fromkeys([*((8,) if most < 8 * TILE else ()), *range(step, most + 1, step), most // TILE * TILE]))


def of_terms(channels: int, outputs: int, terms: int) -> list[tuple[int, int]]:
    """Ranks and inner ranks for a core of several groups, few, as each takes a fit: quarters to halves of the channels.

    A group has a multiple of eight channels on both sides, as the runtime's blocked layouts want.
    """
    step = 8 * terms
    values = dict.fromkeys(channels * share // 8 // step * step for share in (2, 3, 4))
    return [(rank, inner) for inner in values for rank in values if 0 < inner <= rank < outputs]


def rungs(entries: Sequence[Entry], most_error: float, points: int = _RUNGS) -> list[Entry]:
    """Sizes on the lower edge of (multiply-adds, error), at about equal ratios of the work, the cheapest first."""
    edge: list[Entry] = []
    for entry in sorted(entries, key=lambda e: (e.macs, e.error)):
        if entry.error <= most_error and (not edge or entry.error < edge[-1].error):
            edge.append(entry)
    if len(edge) <= points:
        return edge
    work = np.log([entry.macs for entry in edge])
    wanted = np.linspace(work[0], work[-1], points)
    return [edge[i] for i in sorted({int(np.abs(work - w).argmin()) for w in wanted})]


def competing(entries: Iterable[Entry], share: float = 0.8) -> list[Entry]:
    """The sizes that no other one beats: with no more error, at `share` of the multiply-adds.

    A size of a kind with two ranks has one node more, so for it no more multiply-adds are enough.
    """
    known = list(entries)
    errors: Array = np.array([e.error for e in known])
    work = np.array([e.macs for e in known], np.float64)

    def beaten(entry: Entry) -> bool:
        other = np.array([e.kind != entry.kind for e in known])
        least = entry.macs if entry.ranks > 1 else share * entry.macs
        return bool(np.any(other & (errors <= entry.error) & (work <= least)))

    return [entry for entry in known if not beaten(entry)]
