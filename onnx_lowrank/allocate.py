"""Which site gets which rank: a multiple-choice knapsack over estimated losses and measured milliseconds.

Pure functions. Every site becomes one of its candidates or stays dense (ALGORITHMS §4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy.optimize
import scipy.sparse

from onnx_lowrank.plan import Decision
from onnx_lowrank.sites import Why

Cost = Literal["ms", "macs", "weights"]
"""What a plan saves: milliseconds, multiply-adds of the timed sample, or stored weights."""

Plans = list[tuple[float, tuple[Decision, ...]]]
"""Plans from mild to aggressive, each with its predicted loss (the sum over the sites)."""

_MILP_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One kind at one rank for one site.

    `error` is the exact relative error of the site's own output, `ms` the measured time of the fragment, `loss` the
    estimated loss of the model's outputs, `macs` multiply-adds on the timed sample, `weights` stored numbers.
    `inner` is the first of two ranks, 0 for a kind of one.
    `partner` names the site that must take the same kind and rank: the other half of a hidden layer.
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


Picks = tuple[tuple[int, Candidate], ...]
"""What some sites become, by their index: one site and its candidate, or the two halves of a hidden layer."""


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
        )

    @property
    def alone(self) -> tuple[Candidate, ...]:
        """The candidates that ask nothing of another site."""
        return tuple(c for c in self.candidates if c.partner is None)

    def stay(self) -> Decision:
        """The decision for the dense weight, with the reason that holds when another plan was chosen."""
        if self.dense.why is not None:
            return self.dense
        return self.dense.keep(Why.LOSS if self.candidates else Why.NOT_FASTER)


def frontier(choices: Sequence[Choices], of: Cost = "ms") -> Plans:
    """Every plan of the Lagrangian sweep: at each price of loss in `of`, the best choice of every unit.

    A unit is a site, or the two sites of a hidden layer. Its choices at falling prices are the corners of the lower
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


def _units(choices: Sequence[Choices], of: Cost) -> list[tuple[tuple[int, ...], list[_Option]]]:
    """The sites, or pairs of sites, that are chosen for on their own, and what each can become."""

    def option(unit: tuple[int, ...], picks: Picks) -> _Option:
        picked = dict(picks)
        cost = sum(float(getattr(picked[i], of)) if i in picked else choices[i].cost(of) for i in unit)
        return _Option(cost, sum(candidate.loss for _, candidate in picks), picks)

    single = [[option((i,), ((i, c),)) for c in choice.alone] for i, choice in enumerate(choices)]
    pairs: dict[tuple[int, ...], list[_Option]] = {}
    for picks in halves(choices):
        unit = (picks[0][0], picks[1][0])
        pairs.setdefault(unit, []).append(option(unit, picks))
    for (i, j), options in pairs.items():
        corners = [[(), *(o.picks for o in _hull(choices[k].cost(of), single[k]))] for k in (i, j)]
        options.extend(option((i, j), (*first, *second)) for first in corners[0] for second in corners[1])
    paired = {index for unit in pairs for index in unit}
    alone = [((i,), options) for i, options in enumerate(single) if i not in paired]
    return sorted([*alone, *pairs.items()], key=lambda unit: unit[0])


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


def settle(
    choices: Sequence[Choices], *, least: Cost | Literal["loss"], limited: Cost | Literal["loss"], limit: float
) -> tuple[Decision, ...] | None:
    """One target, solved as a whole: the plan with the least sum of `least` whose sum of `limited` is in `limit`.

    None when no plan is within the limit. Ties and gaps below 0.1 % are left as the solver finds them.
    """
    options: list[Picks | int] = []
    for index, choice in enumerate(choices):
        options.append(index)
        options.extend(((index, candidate),) for candidate in choice.alone)
    options.extend(halves(choices))

    def sums(of: Cost | Literal["loss"]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        def value(option: Picks | int) -> float:
            if isinstance(option, int):
                return 0.0 if of == "loss" else choices[option].cost(of)
            return sum(float(getattr(candidate, of)) for _, candidate in option)

        return np.array([value(option) for option in options])

    goal, bound = sums(least), sums(limited)
    scale = max(abs(limit), 1e-12)
    found = scipy.optimize.milp(
        goal / max(goal.max(), 1e-12),
        integrality=np.ones(len(options), np.int64),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(_once(options), 1, 1),
            scipy.optimize.LinearConstraint((bound / scale)[None, :], -np.inf, limit / scale),
        ],
        options={"mip_rel_gap": 1e-3, "time_limit": _MILP_SECONDS},
    )
    if found.x is None:
        return None
    chosen = [choice.stay() for choice in choices]
    for taken, option in zip(found.x, options, strict=True):
        if taken > 0.5 and not isinstance(option, int):
            for index, candidate in option:
                chosen[index] = choices[index].become(candidate)
    return tuple(chosen)


def _once(options: Sequence[Picks | int]) -> scipy.sparse.csr_array:
    """One row for every site: the options that decide it, one of which is taken."""
    decided = [
        (index, column)
        for column, option in enumerate(options)
        for index in ([option] if isinstance(option, int) else [site for site, _ in option])
    ]
    sites, columns = zip(*decided, strict=True)
    return scipy.sparse.csr_array((np.ones(len(decided)), (sites, columns)))
