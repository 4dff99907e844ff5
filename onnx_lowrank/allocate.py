"""Which site gets which rank: a multiple-choice knapsack over estimated losses and measured milliseconds.

Pure functions. Every site becomes one of its candidates or stays dense (ALGORITHMS §4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from onnx_lowrank.plan import Decision
from onnx_lowrank.sites import Why

Cost = Literal["ms", "macs", "weights"]
"""What a plan saves: milliseconds, multiply-adds of the timed sample, or stored weights."""

Plans = list[tuple[float, tuple[Decision, ...]]]
"""Plans from mild to aggressive, each with its predicted loss (the sum over the sites)."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One kind at one rank for one site.

    `error` is the exact relative error of the site's own output, `ms` the measured time of the fragment, `loss` the
    estimated loss of the model's outputs, `macs` multiply-adds on the timed sample, `weights` stored numbers.
    `inner` is the first of two ranks, 0 for a kind of one.
    `partner` names the site that must take the same kind and rank: the other half of a hidden layer.
    `sharers` are the sites that must take the same kind and rank, this one among them: they share a first factor.
    """

    kind: str
    rank: int
    error: float
    ms: float
    loss: float
    macs: int = 0
    weights: int = 0
    partner: str | None = None
    inner: int = 0
    sharers: tuple[str, ...] = ()


Picks = tuple[tuple[int, Candidate], ...]
"""What some sites become, by their index: one site and its candidate, or sites that are decided together."""


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a site can become.

    Attributes:
        dense: the undecided decision.
        candidates: each was measured faster than dense, and no larger rank of its kind is as fast.
        timed: all that was timed, also what is not faster; for baselines that do not look at time.
        macs, weights: of the dense weight.
    """

    dense: Decision
    candidates: tuple[Candidate, ...]
    timed: tuple[Candidate, ...] = ()
    macs: int = 0
    weights: int = 0

    def cost(self, of: Cost) -> float:
        """Cost of the dense weight."""
        return float((self.dense.ms_before or 0.0) if of == "ms" else getattr(self, of))

    def become(self, candidate: Candidate) -> Decision:
        """The decision for a candidate."""
        return dataclasses.replace(
            self.dense,
            kind=candidate.kind,
            rank=candidate.rank,
            ms_after=candidate.ms,
            error=candidate.error,
            loss=candidate.loss,
            why=None,
            partner=candidate.partner,
            inner=candidate.inner,
            sharers=candidate.sharers,
        )

    @property
    def alone(self) -> tuple[Candidate, ...]:
        """The candidates that ask nothing of another site."""
        return tuple(c for c in self.candidates if c.partner is None and not c.sharers)

    @property
    def ranked(self) -> tuple[Candidate, ...]:
        """The candidates whose own output is of a low rank: all but those of narrower layers."""
        return tuple(c for c in self.candidates if c.partner is None)

    def stay(self) -> Decision:
        """The decision for the dense weight, with the reason that holds when another plan was chosen."""
        if self.dense.why is not None:
            return self.dense
        return self.dense.keep(Why.LOSS if self.candidates else Why.NOT_FASTER)


def frontier(choices: Sequence[Choices], of: Cost = "ms") -> Plans:
    """Every plan of the Lagrangian sweep: at each price of loss in `of`, the best choice of every unit.

    A unit is a site, or sites that may be decided together. Its choices at falling prices are the corners of the lower
    convex hull of (cost, loss), so the whole frontier is all hull edges of all units, the cheapest loss per saving
    first.
    """
    steps = []
    for unit, options in _units(choices, of):
        at = (sum(choices[index].cost(of) for index in unit), 0.0)
        for option in _hull(at[0], options):
            steps.append(((option.loss - at[1]) / (at[0] - option.cost), unit, option))
            at = (option.cost, option.loss)
    chosen: list[Decision] = [choice.stay() for choice in choices]
    plans: Plans = []
    for _, unit, option in sorted(steps, key=lambda step: step[:2]):
        picked = dict(option.picks)
        for index in unit:
            chosen[index] = choices[index].become(picked[index]) if index in picked else choices[index].stay()
        plans.append((predicted_loss(chosen), tuple(chosen)))
    return plans


@dataclasses.dataclass(frozen=True)
class _Option:
    """What a unit can become, with its cost and loss over all its sites."""

    cost: float
    loss: float
    picks: Picks

    @property
    def order(self) -> tuple[float, float, list[tuple[str, int, int]]]:
        return -self.cost, self.loss, [(candidate.kind, candidate.rank, candidate.inner) for _, candidate in self.picks]


def halves(choices: Sequence[Choices]) -> list[Picks]:
    """Hidden layers at every width that both their sites offer, the first site first."""
    offered = {
        (choice.dense.node, c.partner, c.kind, c.rank): (index, c)
        for index, choice in enumerate(choices)
        for c in choice.candidates
        if c.partner is not None
    }
    both = [
        (offered[key], offered[back])
        for key in offered
        if (back := (key[1], key[0], key[2], key[3])) in offered and offered[key][0] < offered[back][0]
    ]
    return sorted(both, key=lambda pair: (pair[0][0], pair[0][1].rank))


def shared_sets(choices: Sequence[Choices]) -> list[Picks]:
    """Sites that share a factor, at every rank that all of them offer, in their order."""
    offered: dict[tuple[tuple[str, ...], int], list[tuple[int, Candidate]]] = {}
    for index, choice in enumerate(choices):
        for candidate in choice.candidates:
            if choice.dense.node in candidate.sharers:
                offered.setdefault((candidate.sharers, candidate.rank), []).append((index, candidate))
    return [tuple(found) for (sharers, _), found in sorted(offered.items()) if len(found) == len(sharers)]


def together(choices: Sequence[Choices]) -> list[Picks]:
    """All that sites can become only together."""
    return [*halves(choices), *shared_sets(choices)]


def _units(choices: Sequence[Choices], of: Cost) -> list[tuple[tuple[int, ...], list[_Option]]]:
    """The sites, or groups of sites, that are chosen for on their own, and what each can become.

    One pick of several sites at most is taken in a unit; the others of its sites become what is best for each alone.
    """

    def option(unit: tuple[int, ...], picks: Picks) -> _Option:
        picked = dict(picks)
        cost = sum(float(getattr(picked[i], of)) if i in picked else choices[i].cost(of) for i in unit)
        return _Option(cost, sum(candidate.loss for _, candidate in picks), picks)

    single = [[option((i,), ((i, c),)) for c in choice.alone] for i, choice in enumerate(choices)]
    joint = together(choices)
    units: list[tuple[tuple[int, ...], list[_Option]]] = []
    for unit in _connected([(i,) for i in range(len(choices))], [tuple(i for i, _ in picks) for picks in joint]):
        starts = {i: (choices[i].cost(of), single[i]) for i in unit}
        if len(unit) == 1:
            units.append((unit, single[unit[0]]))
            continue
        taken = [(), *(picks for picks in joint if picks[0][0] in unit)]
        rest: dict[tuple[int, ...], list[Picks]] = {}
        for picks in taken:
            left = tuple(i for i in unit if i not in dict(picks))
            rest.setdefault(left, _corners({i: starts[i] for i in left}))
        options = [option(unit, (*picks, *more)) for picks in taken
                   for more in rest[tuple(i for i in unit if i not in dict(picks))]]  # fmt: skip
        units.append((unit, options))
    return units


def _corners(sites: Mapping[int, tuple[float, list[_Option]]]) -> list[Picks]:
    """What some sites become together as the price of loss falls, all dense first: each the best for itself.

    Args:
        sites: by index, the cost of the dense weight and what else there is.
    """
    steps = []
    for index, (start, options) in sites.items():
        at = (start, 0.0)
        for corner in _hull(start, options):
            steps.append(((corner.loss - at[1]) / (at[0] - corner.cost), index, corner.picks))
            at = (corner.cost, corner.loss)
    chosen: dict[int, Picks] = {}
    found: list[Picks] = [()]
    for _, index, picks in sorted(steps, key=lambda step: step[:2]):
        chosen[index] = picks
        found.append(tuple(pick for one in chosen.values() for pick in one))
    return found


def _connected(alone: Sequence[tuple[int, ...]], groups: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The indexes in as many parts as there can be with no group in two of them, by their first index."""
    part = {i: set(one) for one in alone for i in one}
    for group in groups:
        whole = set().union(*(part[i] for i in group))
        part |= dict.fromkeys(whole, whole)
    return sorted({tuple(sorted(one)) for one in part.values()})


def _hull(start: float, options: Sequence[_Option]) -> list[_Option]:
    """Options at the corners of the lower convex hull of (cost, loss), dense (`start`, 0) at its end; mildest first."""
    corners: list[_Option] = []
    for here in sorted((o for o in options if o.cost < start), key=lambda o: o.order):
        while corners and here.loss <= corners[-1].loss:
            corners.pop()
        while corners:
            before = (corners[-2].cost, corners[-2].loss) if len(corners) > 1 else (start, 0.0)
            last = corners[-1]
            if (last.loss - before[1]) * (before[0] - here.cost) < (here.loss - before[1]) * (before[0] - last.cost):
                break
            corners.pop()
        if not corners or here.cost < corners[-1].cost:
            corners.append(here)
    return corners


def predicted_loss(decisions: Sequence[Decision]) -> float:
    """Sum of the sites' estimated losses."""
    return float(sum(d.loss or 0.0 for d in decisions))


def predicted_ms(decisions: Sequence[Decision]) -> float:
    """Milliseconds that the rewritten sites save."""
    return float(sum((d.ms_before or 0.0) - (d.ms_after or 0.0) for d in decisions if d.kind is not None))
