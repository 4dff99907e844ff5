"""From a plan to a verified file, or to the original: stage, measure, give back, publish, report."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onnx_lowrank.columns import Column, columns_of
from onnx_lowrank.errors import RequirementError, VerificationError
from onnx_lowrank.evidence import FEW, Evidence
from onnx_lowrank.examine import examined
from onnx_lowrank.files import ModelFile, copy_model, read_model, taken, write_model
from onnx_lowrank.hardware import hardware
from onnx_lowrank.latency import machine
from onnx_lowrank.measure import Latency, cautions, no_change
from onnx_lowrank.plan import Plan
from onnx_lowrank.prediction import Prediction, predicted
from onnx_lowrank.publishing import publish, replacing, staging
from onnx_lowrank.report import ModelFacts, Report, Verdict
from onnx_lowrank.run import Run
from onnx_lowrank.settings import Settings
from onnx_lowrank.verify import Measured, facts, facts_of, loss_of_file, measured, race_files
from onnx_lowrank.wholes import additivity
from onnx_lowrank.witness import passes

_GIVE_BACK_ROUNDS = 6
_UNSURE = 1.5  # a loss that may be above the limit by more than this factor is worth a warning


def finish(
    run: Run, plan: Plan, out: Path, external_data: bool | None, command: str, *,
    give_back: bool, keep_fp32: Path | None = None,
) -> Report:  # fmt: skip
    """Write, load and measure the plan's model; give sites back until loss and speed hold, then publish.

    Where no site is left, the original in the precision that is asked for, with its neighbours merged, is measured and
    published.

    Raises:
        VerificationError: it does not hold and nothing may be given back.
        RequirementError: `require_speedup` is not met.
    """
    file = run.loaded.file
    external = file.external if external_data is None else external_data
    before = facts(file, run.loaded)
    with staging(out) as staged:
        plan, found = _held(run, plan, staged, external, give_back=give_back)
        run.clock("verify", 1, 1)
        if found is None:
            return _unchanged(run, plan, before, staged, out, command)
        beside = None if keep_fp32 is None else functools.partial(_keep, run, plan, keep_fp32, external)
        return _publish(run, plan, found, before, staged, out, command, beside)


def _keep(run: Run, plan: Plan, path: Path, external: bool) -> None:
    """Write the factored model in float32, before OUT is there: what cannot be written costs nothing."""
    built, source = run.build(plan.decisions, provenance=run.settings.provenance), run.loaded.file
    with staging(path) as staged:
        write_model(built, staged, folder=source.folder, external=external)
        publish(staged, path, source.path)


def _held(run: Run, plan: Plan, staged: Path, external: bool, *, give_back: bool) -> tuple[Plan, Measured | None]:
    """The plan, with sites given back until the saved file holds, and what was measured; None when none does."""
    for attempt in range(_GIVE_BACK_ROUNDS):
        if not plan.rewritten:
            break
        run.clock("verify", attempt, _GIVE_BACK_ROUNDS)
        found = _saved(run, plan, staged, external)
        holds = _holds(found, run.settings)
        denied = holds and attempt > 0 and not passes(run, plan.decisions)  # factors undo errors that are gone
        if holds and not denied:
            if attempt and not run.table.given:
                run.additivity = additivity(run, plan.decisions, run.additivity.get("corrected_sites", 0))
            return plan, found
        if not give_back:
            raise VerificationError(_failure(found, run.settings))
        lossy = denied or found.loss_at(run.settings.sure) > run.settings.limit
        plan = plan.giving_back(_worst(plan, lossy=lossy))
    run.additivity = {}
    if run.lowering is None and not run.loaded.merged:
        return plan, None
    plan = plan.giving_back(d.node for d in plan.rewritten)
    found = _saved(run, plan, staged, external)
    if _holds(found, run.settings):
        return plan, found
    if not give_back:
        raise VerificationError(_failure(found, run.settings))
    return plan, None


def _saved(run: Run, plan: Plan, staged: Path, external: bool) -> Measured:
    """Write the plan's model and measure the file."""
    built = run.deployed(plan.decisions, provenance=run.settings.provenance)
    write_model(built, staged, folder=run.loaded.file.folder, external=external)
    if run.lowering is None or not run.settings.verify_latency:
        found = measured(staged, run.loaded, run.references, run.settings)
        if run.settings.verify_latency:
            return found
        return dataclasses.replace(found, predicted=predicted(run, plan.decisions).ratio)
    counted = loss_of_file(staged, run.references, run.settings)
    latency, columns = columns_of(run, plan, staged, counted.value())
    return Measured(counted.value(), latency, counted, columns=columns)


def _holds(found: Measured, settings: Settings) -> bool:
    return found.loss_at(settings.sure) <= settings.limit and found.faster


def _failure(found: Measured, settings: Settings) -> str:
    ratio, sure = found.speedup, settings.sure
    at = f", below {found.loss_at(sure):.3g} with {100 * sure:g} % confidence" if sure > 0.5 else ""
    return (
        f"the rewritten model has loss {found.loss:.3g}{at} (limit {settings.limit:g}) and speed-up {ratio.value:.3f} "
        f"({ratio.low:.3f}–{ratio.high:.3f}); nothing was written, run optimize to make a plan that holds here"
    )


def _worst(plan: Plan, *, lossy: bool) -> list[str]:
    """Which sites to give back: the one that loses most, or the half that gains least."""
    if lossy:
        return [max(plan.rewritten, key=lambda d: d.loss or d.error or 0.0).node]
    ranked = sorted(plan.rewritten, key=lambda d: (d.ms_after or 0.0) / (d.ms_before or 1.0), reverse=True)
    return [d.node for d in ranked[: max(1, (len(ranked) + 1) // 2)]]


def _unchanged(run: Run, plan: Plan, before: ModelFacts, staged: Path, out: Path, command: str) -> Report:
    if run.settings.require_speedup is not None:
        raise RequirementError(f"no speed-up within loss {run.settings.limit:g}; nothing was written")
    warned = _copied(run.loaded.file, staged, out)
    run.warnings += warned
    counts: dict[str, int] = {}
    for decision in plan.decisions:
        if decision.why is not None:
            counts[decision.why.value] = counts.get(decision.why.value, 0) + 1
    why = "; ".join(f"{n} × {text}" for text, n in sorted(counts.items(), key=lambda c: -c[1]))
    reason = f"nothing pays here ({why})" if why else "no site can be factored"
    if run.lowering is not None and run.settings.verify_latency:
        reason = f"{run.lowering.scheme.precision} is not faster within the loss, alone or with low rank ({why})"
    after = facts_of(out, run.loaded, out) if warned else dataclasses.replace(before, path=str(out))
    found = hardware_of(run, run.loaded.file.path)
    verdict = verdict_of(run, "unchanged", reason, None, loss=0.0)
    return report_of(run, plan, verdict, before, after, (), command, found)


def _copied(file: ModelFile, staged: Path, out: Path) -> list[str]:
    """Put the original in OUT's place; its data under OUT's name, with a warning, where other content has its own."""
    other = taken(file, out)
    if other is None:
        with replacing(staged, out, file.path):
            copy_model(file, out)
        return []
    write_model(read_model(file.path).model, staged, folder=file.folder, external=True)
    publish(staged, out, file.path)
    return [f"'{other}' is there with other content: OUT is the original, but its data file has a name of its own"]


def _publish(
    run: Run, plan: Plan, found: Measured, before: ModelFacts, staged: Path, out: Path, command: str,
    beside: Callable[[], None] | None,
) -> Report:  # fmt: skip
    wanted, ratio = run.settings.require_speedup, found.speedup
    if wanted is not None and ratio.low < wanted:
        raise RequirementError(
            f"speed-up {ratio.value:.3f} ({ratio.low:.3f}–{ratio.high:.3f}) is not surely {wanted:g}; OUT not written"
        )
    default = _at_default_threads(run, staged)
    run.warnings += [*cautions((*found.latency, *default)), *unsure_loss(found, run.settings)]
    goal = run.settings.speedup
    if goal is not None and ratio.value < goal:
        run.warnings.append(f"the saved file is measured {ratio.value:.3f}× faster, {goal:g}× was the goal")
    after = facts_of(staged, run.loaded, out)
    around = hardware_of(run, staged) | ({"start": found.start} if found.start else {})
    details = examined(run, staged, found)
    if beside is not None:
        beside()
    publish(staged, out, run.loaded.file.path)
    reason = f"{len(plan.rewritten)} of {len(plan.decisions)} sites rewritten"
    if run.lowering is not None and not plan.rewritten:
        reason = f"no site was factored: {run.lowering.scheme.precision} alone is the best here"
    if run.loaded.merged:
        count = len(run.loaded.merged)
        reason += f", neighbours taken in at {count} node{'s' if count > 1 else ''}"
    verdict = verdict_of(run, "optimized", reason, found, loss=found.loss)
    if not run.settings.verify_latency:
        verdict = dataclasses.replace(verdict, scope=scope_of(predicted(run, plan.decisions), run))
    report = report_of(run, plan, verdict, before, after, (*found.latency, *default), command, around, found.columns)
    return dataclasses.replace(report, details=details)


def _at_default_threads(run: Run, staged: Path) -> tuple[Latency, ...]:
    """The timing at the runtime's own thread count, with a warning where the gain is not sure there."""
    if not run.settings.verify_latency:
        return ()
    default = race_files([run.loaded.file.path, staged], run.loaded, run.settings, threads=0, seconds=6.0)[0]
    if default.ratio.low <= 1:
        run.warnings.append(
            f"at the runtime's default thread count the ratio is {default.ratio.value:.2f} "
            f"({default.ratio.low:.2f}–{default.ratio.high:.2f}): the gain is not sure there"
        )
    return (default,)


def hardware_of(run: Run, model: Path) -> dict[str, Any]:
    """The card, and what of a model it left to the CPU."""
    settings = run.settings
    return hardware(model, run.loaded.feeds[0], settings.provider, settings.threads, run.warnings)


def scope_of(found: Prediction, run: Run) -> str:
    """What a predicted ratio is about."""
    over = f", over {run.lowering.scheme.precision} alone" if run.lowering else ""
    return ("the whole model" if found.whole else "its sites alone, the other nodes left out") + over


def verdict_of(run: Run, status: str, reason: str, found: Measured | None, *, loss: float) -> Verdict:
    """The verdict on what was measured, or on the original left as it is."""
    dtypes = {site.geometry.dtype for site in run.loaded.sites}
    return Verdict(
        status=status,
        reason=reason,
        speedup=found.speedup if found else no_change(),
        loss=loss,
        loss_upper=_upper(found),
        loss_limit=run.settings.limit if math.isfinite(run.settings.limit) else None,
        confidence=run.settings.sure,
        metric=run.settings.metric,
        data="synthetic" if run.loaded.source.synthetic else "user",
        samples=run.references.count,
        provider=str(run.settings.provider),
        provider_options=dict(run.settings.provider_options),
        latency="measured" if run.settings.verify_latency else "predicted",
        machine=machine(run.table.environment) if run.table.given else None,
        precision=run.lowering.scheme.words() if run.lowering else "+".join(sorted(dtypes)) or "as the model is",
        over_precision=next((c.over for c in found.columns[3:]), None) if found else None,
    )


def _upper(found: Measured | None) -> float | None:
    """What the loss is below with 95 % confidence, where the samples tell."""
    upper = found.loss_at(0.95) if found else math.inf
    return upper if math.isfinite(upper) else None


def unsure_loss(found: Measured, settings: Settings) -> list[str]:
    """A sentence about a loss whose samples differ so much that it may well be far above the limit."""
    upper = _upper(found)
    if upper is None or upper <= _UNSURE * settings.limit:
        return []
    return [
        f"the {len(found.sample_losses)} held-out samples differ much: they only show a loss below {upper:.2g} (95 %), "
        f"the limit is {settings.limit:g}; give more samples, or hold the limit with confidence 0.95, as is the default"
    ]


def thin_evidence(known: Mapping[str, Evidence]) -> list[str]:
    """A sentence about sites that were fitted to few positions; their names are those of the worst."""
    few = sorted((e.positions / e.width, name) for name, e in known.items() if e.few)
    if not few:
        return []
    worst = known[few[0][1]]
    return [
        f"{len(few)} of {len(known)} rewritten sites were fitted to fewer than {FEW} positions for each dimension "
        f"({few[0][1]}: {worst.positions} for {worst.width}); give more samples"
    ]


def report_of(
    run: Run, plan: Plan, verdict: Verdict, before: ModelFacts, after: ModelFacts,
    latency: tuple[Latency, ...], command: str, hardware: Mapping[str, Any], columns: tuple[Column, ...] = (),
) -> Report:  # fmt: skip
    run.clock("report", 1, 1)
    evidence = {name: fit.evidence for name, fit in run.fits.items() if fit.evidence is not None}
    if not run.loaded.source.synthetic:
        run.warnings += thin_evidence({d.node: evidence[d.node] for d in plan.rewritten if d.node in evidence})
    return Report(
        verdict=verdict,
        before=before,
        after=after,
        plan=plan,
        kept=run.loaded.kept,
        evidence=evidence,
        merged=tuple(dataclasses.asdict(one) for one in run.loaded.merged),
        frontier=tuple(run.frontier),
        latency=latency,
        staircases=run.table.rows({site.geometry for site in run.loaded.sites}),
        seconds=dict(run.clock.seconds),
        command=command,
        warnings=tuple(run.warnings),
        additivity=run.additivity,
        probes=run.probes,
        hardware=dict(hardware),
        precisions=tuple(column.to_dict() for column in columns),
        ways=tuple(dataclasses.asdict(way) for way in run.ways),
    )
