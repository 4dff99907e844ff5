"""A chosen plan on all samples: those that its factors were fitted to cannot show that it is good, but that it is bad.

The search and the repair read the held-out samples dozens of times, and where a few samples carry the loss they find a
plan that happens to spare those: it loses more on what it was fitted to than on them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from onnx_lowrank.allocate import Choices, frontier, predicted_loss
from onnx_lowrank.candidates import served
from onnx_lowrank.repair import Decisions, Repaired
from onnx_lowrank.run import Run
from onnx_lowrank.search import search

_BUILDS = 8  # plans that are built to be run on all samples, with the same factors


def held_by_all(run: Run, choices: Sequence[Choices], first: Repaired, found: Repaired) -> Repaired:
    """A plan within the limit on all samples too; `found` where it is one, or none is asked for.

    Else the last plan that all samples let pass, with the repaired factors between the plan that they were made for
    and what they were spent on; where there is none, with the factors of the original's activations up to the first
    plan. Repaired factors undo the errors of the plan that they were made for: a milder one loses by them.

    Args:
        first: the plan before any repair.
        found: the plan that the repair has led to.
    """
    if not _asked(run) or not any(d.kind for d in found.decisions):
        return found
    lost = dataclasses.replace(run, fits=found.fits).loss_of_all(found.decisions)
    if lost <= run.settings.limit:
        return found
    run.warnings.append("the held-out samples alone allow a faster plan, all samples do not")
    if found.refits and found.decisions != found.made_for:
        least, most = predicted_loss(found.made_for), predicted_loss(found.decisions)
        left = frontier(served(choices, run.loaded.sites, found.fits))
        between = [found.made_for, *(plan for loss, plan in left if least < loss < most)]
        better = _last(run, found, between, lost / max(run.base_loss + most, 1e-12))
        if better is not None:
            return better
    most, scale = predicted_loss(first.decisions), 1.0
    milder = [plan for loss, plan in frontier(choices) if loss < most]
    if found.refits:
        milder.append(first.decisions)
    else:
        scale = lost / max(run.base_loss + most, 1e-12)
    stays = dataclasses.replace(first, decisions=tuple(c.stay() for c in choices))
    return _last(run, first, milder, scale) or stays


def passes(run: Run, decisions: Decisions) -> bool:
    """Whether a plan is within the limit on all samples too, as far as that is asked for."""
    return not _asked(run) or run.loss_of_all(decisions) <= run.settings.limit


def _asked(run: Run) -> bool:
    """Whether the limit is to be held as surely as all samples tell."""
    settings, limit = run.settings, run.settings.limit
    return settings.policy == "knapsack" and settings.sure > 0.5 and math.isfinite(limit) and not run.loaded.shared


def _last(run: Run, made: Repaired, plans: Sequence[Decisions], scale: float) -> Repaired | None:
    """The last of some plans that all samples let pass, with the factors of `made`."""
    based = [(run.base_loss + predicted_loss(plan), plan) for plan in plans]
    with_fits = dataclasses.replace(run, fits=made.fits)
    scale = scale if math.isfinite(scale) else 1.0
    holds = search(based, with_fits.loss_of_all, run.settings.limit, rounds=_BUILDS, scale=scale).holds
    return dataclasses.replace(made, decisions=holds) if holds else None
