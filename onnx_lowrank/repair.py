"""Repair factors with data, and spend what that wins on a faster plan.

A refit moves a site's weight towards what undoes the errors before it, and the moved weight can be factored at any
rank. So the two take turns: refit, look for a faster plan that holds its loss with the factors at hand, refit again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from onnx_lowrank import measure
from onnx_lowrank.allocate import Choices
from onnx_lowrank.calibration import Fits
from onnx_lowrank.fragment import Size
from onnx_lowrank.plan import Decision, Refit
from onnx_lowrank.refit import Group, cost, refit
from onnx_lowrank.run import Run

Decisions = tuple[Decision, ...]

_MACS = 3e12  # multiply-adds that all refits together may take
_ROUNDS = (1, 3)  # refits: least and most
_STEP = 1.02  # another refit is not worth less than this ratio of the sites' time


@dataclasses.dataclass(frozen=True)
class Repaired:
    """A plan and its factors, repaired or not.

    Attributes:
        refits: in their order; none where the fits are of the original's activations.
        loss: measured after the last refit, of the plan that it was made for.
        made_for: the plan that the last refit was made for, which it may have been spent on.
    """

    decisions: Decisions
    refits: tuple[Refit, ...]
    fits: Fits
    loss: float = 0.0
    made_for: Decisions = ()


def repaired(run: Run, decisions: Decisions, choices: Sequence[Choices] = ()) -> Repaired:
    """Refit a plan group by group; a group that raises the loss on held-out samples keeps its old factors.

    Args:
        choices: what the sites may become next: the next faster size of each is made ready too.
    """
    best = run.loss_of(decisions)
    kept: list[str] = []

    def keep(group: Group, fits: Fits) -> bool:
        nonlocal best
        loss = dataclasses.replace(run, fits=fits).loss_of(decisions)
        if loss >= best:
            return False
        best = loss
        kept.extend(site.name for site in group)
        return True

    near = next_faster(choices, decisions)
    fits = refit(run.loaded, run.settings, run.fits, decisions, keep, lambda n, of: run.clock("refit", n, of), near)
    ready = ((node, *size) for node, sizes in near.items() for size in sizes)
    refits = (Refit.of(decisions, kept, ready),) if kept else ()
    return Repaired(decisions, refits, fits, best, decisions)


def replayed(run: Run, decisions: Sequence[Decision], refits: Sequence[Refit]) -> Fits:
    """The fits of a plan whose refits are known: nothing is measured, so the same bytes come out."""
    fits = run.fits
    plans = (*(one.plan(decisions) for one in refits), decisions)
    asked = {(d.node, d.rank or 0, d.inner) for plan in plans for d in plan}
    for one in refits:
        names = set(one.kept)
        near: dict[str, set[Size]] = {}
        for node, rank, inner in asked.intersection(one.near):
            near.setdefault(node, set()).add((rank, inner))
        fits = refit(
            run.loaded,
            run.settings,
            fits,
            one.plan(decisions),
            lambda group, _, names=names: any(site.name in names for site in group),  # type: ignore[misc]
            lambda n, of: run.clock("refit", n, of),
            near,
        )
    return fits


def next_faster(choices: Sequence[Choices], decisions: Sequence[Decision]) -> dict[str, set[Size]]:
    """The next faster size of the same kind, by site; a narrower layer takes any width as it is."""
    known, found = {choice.dense.node: choice for choice in choices}, {}
    for d in decisions:
        if d.kind is None or d.partner is not None or d.node not in known:
            continue
        faster = [c for c in known[d.node].alone if c.kind == d.kind and c.ms < (d.ms_after or 0.0)]
        if faster:
            best = max(faster, key=lambda c: c.ms)
            found[d.node] = {(best.rank, best.inner)}
    return found


def rounds(run: Run) -> int:
    """Refits that a model is worth: more of them when it is quickly run."""
    macs, count = measure.multiply_adds(dict(run.loaded.runs[0])), sum(1 for _ in run.loaded.calibration)
    least, most = _ROUNDS
    return int(min(max(_MACS / max(cost(macs, count), 1), least), most))


def spent(
    run: Run,
    decisions: Decisions,
    further: Callable[[Repaired], Decisions | None],
    choices: Sequence[Choices] = (),
) -> Repaired:
    """Refits and faster plans in turn, as long as they pay; the loss of what is returned was measured to hold.

    Args:
        decisions: a plan that holds without a refit.
        further: the furthest plan whose measured loss holds with the fits of a repaired one.
        choices: what the sites may become.
    """
    found = Repaired(decisions, (), run.fits)
    for _ in range(rounds(run)):
        one = repaired(dataclasses.replace(run, fits=found.fits), found.decisions, choices)
        if not one.refits:
            break
        found = dataclasses.replace(one, refits=(*found.refits, *one.refits))
        plan = further(found)
        if plan is None or _ms(found.decisions) <= _ms(plan):
            break
        pays = _ms(found.decisions) > _STEP * _ms(plan)
        found = dataclasses.replace(found, decisions=plan)
        if not pays:
            break
    return found


def _ms(decisions: Decisions) -> float:
    return sum(d.ms_before or 0.0 if d.kind is None else d.ms_after or 0.0 for d in decisions)
