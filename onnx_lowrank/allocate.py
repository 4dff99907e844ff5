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
    """

    kind: str
    rank: int
    error: float
    ms: float
    loss: float
    macs: int = 0
    weights: int = 0


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
        )

    def stay(self) -> Decision:
        """The decision for the dense weight, with the reason that holds when another plan was chosen."""
        if self.dense.why is not None:
            return self.dense
        return self.dense.keep(Why.LOSS if self.candidates else Why.NOT_FASTER)


def frontier(choices: Sequence[Choices], of: Cost = "ms") -> Plans:
    """Every plan of the Lagrangian sweep: at each price of loss in `of`, the best choice of every site.

    A site's choices at falling prices are the corners of the lower convex hull of (cost, loss), so the whole
    frontier is all hull edges of all sites, the cheapest loss per saving first.
    """
    steps = []
    for index, choice in enumerate(choices):
        at = (choice.cost(of), 0.0)
        for candidate in _hull(choice, of):
            slope = (candidate.loss - at[1]) / (at[0] - getattr(candidate, of))
            steps.append((slope, index, candidate))
            at = (float(getattr(candidate, of)), candidate.loss)
    chosen: list[Decision] = [choice.stay() for choice in choices]
    plans: Plans = []
    for _, index, candidate in sorted(steps, key=lambda step: step[:2]):
        chosen[index] = choices[index].become(candidate)
        plans.append((predicted_loss(chosen), tuple(chosen)))
    return plans


def _hull(choice: Choices, of: Cost) -> list[Candidate]:
    """Candidates at the corners of the lower convex hull of (cost, loss), dense at its end; the mildest first."""
    corners: list[Candidate] = []
    start = (choice.cost(of), 0.0)
    cheaper = [c for c in choice.candidates if getattr(c, of) < start[0]]
    for candidate in sorted(cheaper, key=lambda c: (-getattr(c, of), c.loss, c.kind, c.rank)):
        while corners and candidate.loss <= corners[-1].loss:
            corners.pop()
        while corners:
            before = (getattr(corners[-2], of), corners[-2].loss) if len(corners) > 1 else start
            last = (getattr(corners[-1], of), corners[-1].loss)
            here = (getattr(candidate, of), candidate.loss)
            if (last[1] - before[1]) * (before[0] - here[0]) < (here[1] - before[1]) * (before[0] - last[0]):
                break
            corners.pop()
        if not corners or getattr(candidate, of) < getattr(corners[-1], of):
            corners.append(candidate)
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
    options: list[tuple[int, Candidate | None]] = []
    for index, choice in enumerate(choices):
        options.append((index, None))
        options.extend((index, candidate) for candidate in choice.candidates)

    def sums(of: Cost | Literal["loss"]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        def value(index: int, candidate: Candidate | None) -> float:
            if candidate is not None:
                return float(getattr(candidate, of))
            return 0.0 if of == "loss" else choices[index].cost(of)

        return np.array([value(*option) for option in options])

    goal, bound = sums(least), sums(limited)
    site = np.array([index for index, _ in options])
    once = scipy.sparse.csr_array((np.ones(len(options)), (site, np.arange(len(options)))))
    scale = max(abs(limit), 1e-12)
    found = scipy.optimize.milp(
        goal / max(goal.max(), 1e-12),
        integrality=np.ones(len(options), np.int64),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(once, 1, 1),
            scipy.optimize.LinearConstraint((bound / scale)[None, :], -np.inf, limit / scale),
        ],
        options={"mip_rel_gap": 1e-3, "time_limit": _MILP_SECONDS},
    )
    if found.x is None:
        return None
    chosen = [choice.stay() for choice in choices]
    for taken, (index, candidate) in zip(found.x, options, strict=True):
        if taken > 0.5 and candidate is not None:
            chosen[index] = choices[index].become(candidate)
    return tuple(chosen)
