"""From measured candidates to a plan: probe, choose for all sites at once, build, measure, correct, choose again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.linalg

from onnx_lowrank import guard, insitu, measure, wholes
from onnx_lowrank.allocate import Choices, Plans, frontier, predicted_loss, predicted_ms
from onnx_lowrank.blame import explained
from onnx_lowrank.candidates import served
from onnx_lowrank.knapsack import settle
from onnx_lowrank.linalg import Array
from onnx_lowrank.mixed import timed_choices
from onnx_lowrank.plan import Decision, Plan
from onnx_lowrank.policies import POLICIES
from onnx_lowrank.probing import with_losses
from onnx_lowrank.repair import Repaired, repaired, spent
from onnx_lowrank.run import Run
from onnx_lowrank.search import search
from onnx_lowrank.witness import held_by_all

Decisions = tuple[Decision, ...]

_ADDITIVE = 0.10  # predicted and measured time of the whole model may differ by this fraction
_PROFILES = 2  # plans whose profile may correct the times
_POLISH_ROUNDS = 2
_CORRECTIONS = 4  # searches again with raised estimates


def choose(run: Run) -> list[Choices]:
    """Every site's candidates with their measured times and estimated losses."""
    return with_losses(run, timed_choices(run))


def decide_plan(run: Run, data: tuple[str, ...], choices: Sequence[Choices] | None = None) -> Plan:
    """Choose kinds and ranks for the goal in the settings, on built and measured models.

    Args:
        data: names of the data, to be kept in the plan.
        choices: from `choose`, where several plans are made of them.
    """
    found = list(choices) if choices is not None else choose(run)
    first = Repaired(_additive(run, found, _reach(run, found)), (), run.fits)
    made = first
    if run.settings.refit and run.settings.policy == "knapsack" and any(d.kind for d in first.decisions):
        made = _repaired(run, found, first)
    chosen = held_by_all(run, found, first, made)
    run.fits = chosen.fits
    if chosen.decisions != made.decisions and not run.table.given:
        run.additivity = wholes.additivity(run, chosen.decisions, run.additivity.get("corrected_sites", 0))
    loaded, settings = run.loaded, run.settings
    return Plan(
        model_sha256=loaded.file.sha256,
        decisions=chosen.decisions,
        max_loss=settings.limit if np.isfinite(settings.limit) else None,
        confidence=settings.sure,
        provider=str(settings.provider),
        threads=settings.threads,
        seed=settings.seed,
        samples=settings.samples,
        data=data,
        shapes=tuple(tuple(sorted(shapes.items())) for shapes in settings.shapes),
        metric=settings.metric,
        output_weights=tuple(sorted(settings.output_weights.items())),
        policy=settings.policy,
        refits=chosen.refits,
        provider_options=tuple(sorted(settings.provider_options.items())),
        scheme=run.lowering.scheme if run.lowering else None,
        merges=tuple((one.taken_in, one.node) for one in loaded.merged),
    )


def _repaired(run: Run, choices: list[Choices], first: Repaired) -> Repaired:
    """Repair the factors; where the loss is the goal, spend what that wins on a faster plan."""
    if run.settings.speedup is not None or run.settings.size is not None:
        found = repaired(run, first.decisions, choices)
    else:
        found = spent(run, first.decisions, lambda one: _further(run, choices, one), choices)
    run.fits = found.fits
    if found.decisions == first.decisions or run.table.given:
        return found
    return _additive_again(run, choices, found)


def _further(run: Run, choices: list[Choices], one: Repaired) -> Decisions | None:
    """The furthest plan that holds with repaired fits."""
    left = served(choices, run.loaded.sites, one.fits)
    scale = one.loss / max(run.base_loss + predicted_loss(one.made_for), 1e-12)
    return _within_loss(dataclasses.replace(run, fits=one.fits), frontier(left), left, run.settings.limit, scale)


def _reach(run: Run, choices: list[Choices]) -> Decisions:
    """The plan for the goal; all dense when none reaches it."""
    dense = tuple(c.stay() for c in choices)
    if run.settings.size is not None:
        return _sized(run, choices) or dense
    plans = POLICIES[run.settings.policy](choices, lambda: _spectra(run))
    plans = sorted(plans, key=lambda plan: plan[0])
    if run.settings.speedup is not None:
        return _fast_enough(run, plans, run.settings.speedup) or dense
    return _within_loss(run, plans, choices, run.settings.limit) or dense


def _spectra(run: Run) -> dict[str, Array]:
    return {s.name: scipy.linalg.svdvals(s.weight.astype(np.float64)) for s in run.loaded.sites}


def _within_loss(run: Run, plans: Plans, choices: list[Choices], limit: float, scale: float = 1.0) -> Decisions | None:
    """The furthest plan whose measured loss holds, then between it and the next one by the whole knapsack.

    Args:
        choices: estimates that a built plan proves wrong are raised in place.
        scale: measured over predicted loss, as far as it is known.
    """
    base = run.base_loss

    def based(plans: Plans) -> Plans:
        return [(base + predicted, decisions) for predicted, decisions in plans]

    found = search(based(plans), lambda decisions: _measured_loss(run, decisions), limit, scale=scale)
    if run.settings.policy != "knapsack":
        return found.holds
    for _ in range(_CORRECTIONS):
        raised = explained(choices, found, limit)
        if raised is None:
            break
        choices[:] = raised
        found = search(based(frontier(choices)), lambda decisions: _measured_loss(run, decisions), limit, scale=scale)
    run.clock("decide", 1, 1)
    best, loss = found.holds, found.value
    if best is None:
        return None
    for _ in range(_POLISH_ROUNDS):
        budget = predicted_loss(best) * (0.99 * limit - base) / max(loss - base, 0.05 * loss, 1e-12)
        better = settle(choices, least="ms", limited="loss", limit=budget)
        if better is None or better == best or predicted_ms(better) <= predicted_ms(best):
            break
        measured = _measured_loss(run, better)
        if measured > limit:
            break
        best, loss = better, measured
    return best


def _measured_loss(run: Run, decisions: Decisions) -> float:
    run.clock("decide", len(run.frontier), len(run.frontier) + 1)
    loss = run.loss_of(decisions)
    ms = sum(d.ms_after or d.ms_before or 0.0 for d in decisions)
    rewritten = sum(d.kind is not None for d in decisions)
    point = {"rewritten": rewritten, "ms": ms, "predicted": run.base_loss + predicted_loss(decisions), "loss": loss}
    run.frontier.append({k: v if np.isfinite(v) else None for k, v in point.items()})
    return loss


def _fast_enough(run: Run, plans: Plans, speedup: float) -> Decisions | None:
    """The mildest plan whose measured time is short enough; the fastest one, with a warning, when none is."""
    if not plans:
        return None
    before = wholes.whole(run, plans[-1][1])["before"]
    made = wholes.precision_alone(run)
    fastest_first = [(made * (1 - predicted_ms(decisions) / before), decisions) for _, decisions in reversed(plans)]

    def share(decisions: Decisions) -> float:
        run.clock("decide", len(run.frontier), len(run.frontier) + 1)
        times = wholes.whole(run, decisions)
        return made * times["after"] / times["before"]

    found = search(fastest_first, share, 1 / speedup)
    run.clock("decide", 1, 1)
    if found.holds is not None:
        return found.holds
    run.warnings.append(f"no plan reaches speed-up {speedup:g}: this is the fastest one")
    return plans[-1][1]


def _sized(run: Run, choices: Sequence[Choices]) -> Decisions | None:
    """The least loss at a fraction of the weights; the smallest plan, with a warning, when that is too small."""
    assert run.settings.size is not None
    opening = run.loaded.opening
    total, now = (measure.parameters(model) for model in (opening.original, opening.closed(run.loaded.file.model)))
    elsewhere = now - sum(c.weights for c in choices)  # neighbours that are merged already count as what they are now
    limit = run.settings.size * total - elsewhere
    found = settle(choices, least="loss", limited="weights", limit=limit) if limit > 0 else None
    if found is None:
        run.warnings.append(f"no plan that is faster reaches size {run.settings.size:g}: this is the smallest one")
        found = settle(choices, least="weights", limited="loss", limit=float(len(choices)) * 1e6)
    return found


def _additive(run: Run, choices: list[Choices], decisions: Decisions) -> Decisions:
    """Hold the sum of the sites' predictions against the whole model; correct by the profile and choose again.

    Sites whose rewrite takes a fusion of the runtime apart are corrected in any case.
    """
    found = {} if run.table.given else wholes.additivity(run, decisions)
    touched: set[str] = set()
    charged: set[str] = set()  # their times hold what is lost elsewhere, which their own profile does not show
    for _ in range(_PROFILES if found else 0):
        lost = {node: ms for node, ms in guard.losses(run, decisions).ms.items() if node not in charged}
        known = wholes.factors(run, decisions) if _off(found) or lost else {}
        known = {n: factor for n, factor in known.items() if n not in charged and (_off(found) or n in lost)}
        if not known and not lost:
            break
        touched.update(known, lost)
        charged.update(lost)
        choices[:] = insitu.corrected(choices, known, lost)
        decisions = _reach(run, choices)
        found = wholes.additivity(run, decisions, len(touched))
        if not _off(found):
            break
    run.additivity = found
    return decisions


def _additive_again(run: Run, choices: list[Choices], one: Repaired) -> Repaired:
    """The plan that a repair has led to, held against the whole model as well, and corrected where it is off."""
    before = run.additivity.get("corrected_sites", 0)
    found = wholes.additivity(run, one.decisions, before)
    known = wholes.factors(run, one.decisions) if _off(found) else {}
    if known:
        choices[:] = insitu.corrected(choices, known)
        plan, before_it = (insitu.retimed(plan, known) for plan in (one.decisions, one.made_for))
        one = dataclasses.replace(one, decisions=plan, made_for=before_it)
        better = _further(run, choices, one)
        if better is not None and predicted_ms(better) > predicted_ms(one.decisions):
            one = dataclasses.replace(one, decisions=better)
        found = wholes.additivity(run, one.decisions, max(before, len(known)))
    run.additivity = found
    return one


def _off(found: Mapping[str, float]) -> bool:
    """Whether the sum of the predictions and the whole model disagree."""
    return bool(found) and abs(found["predicted_ms"] / found["measured_ms"] - 1) > _ADDITIVE
