"""Use what a refit wins: a bolder plan whose loss holds only after its factors are repaired with data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from onnx_lowrank.calibration import Fits
from onnx_lowrank.plan import Decision
from onnx_lowrank.refit import Group, refit
from onnx_lowrank.run import Run

Decisions = tuple[Decision, ...]

_HOPED = 1.4  # loss before the refit over loss after it, tried first
_AIM = 0.95  # of the limit, that the next plan is to reach
_FULL = 0.9  # of the limit: a repaired plan that uses so much of it ends the search
_STEP = 1.03  # a plan less bold or bolder by less than this factor is not worth another repair
_LEAP = 2.5  # how much bolder the next plan may be
_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Repaired:
    """A plan with repaired factors: the sites that were refitted, all fits, and the measured loss before and after."""

    decisions: Decisions
    sites: tuple[str, ...]
    fits: Fits
    before: float
    loss: float


def repaired(run: Run, decisions: Decisions) -> Repaired:
    """Refit a plan group by group; a group that raises the loss on held-out samples keeps its old factors."""
    best = before = run.loss_of(decisions)
    sites: list[str] = []

    def keep(group: Group, fits: Fits) -> bool:
        nonlocal best
        loss = dataclasses.replace(run, fits=fits).loss_of(decisions)
        if loss >= best:
            return False
        best = loss
        sites.extend(site.name for site in group)
        return True

    fits = refit(run.loaded, run.settings, run.fits, decisions, keep, lambda n, of: run.clock("refit", n, of))
    return Repaired(decisions, tuple(sites), fits, before, best)


def replayed(run: Run, decisions: Sequence[Decision], sites: Sequence[str]) -> Fits:
    """The fits of a plan whose refitted sites are known: nothing is measured, so the same bytes come out."""
    names = set(sites)
    return refit(
        run.loaded,
        run.settings,
        run.base,
        decisions,
        lambda group, _: any(site.name in names for site in group),
        lambda n, of: run.clock("refit", n, of),
    )


def bolder(run: Run, decisions: Decisions, within: Callable[[float], Decisions | None]) -> Repaired | None:
    """A faster plan whose loss holds after a refit; None when there is none, and the given plan stays as it is.

    Args:
        decisions: the plan that holds without a refit.
        within: the furthest plan whose measured loss stays within a given limit.
    """
    limit, hoped, held = run.settings.limit, _HOPED, 1.0
    best: Repaired | None = None
    for _ in range(_ROUNDS):
        plan = within(limit * hoped)
        if plan is None or plan == (decisions if best is None else best.decisions):
            break
        found = repaired(run, plan)
        aim = _AIM * found.before / max(found.loss, 1e-12)
        if found.loss <= limit:
            best, held = found, hoped
            if found.loss > _FULL * limit:
                break
            hoped = min(aim, _LEAP * hoped)
        else:
            hoped = min(aim, hoped / _STEP)
        if hoped < held * _STEP:
            break
    return best
