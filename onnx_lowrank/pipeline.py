"""The journey of a model, top to bottom: load, calibrate, measure, decide, rewrite, save, verify, report."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onnx_lowrank.allocate import decide, frontier, search
from onnx_lowrank.errors import RequirementError, SettingsError, VerificationError
from onnx_lowrank.files import check_output, copy_model, write_model
from onnx_lowrank.latency import LatencyTable
from onnx_lowrank.measure import Latency, no_change
from onnx_lowrank.plan import Decision, Plan
from onnx_lowrank.prepare import Fit, Loaded, Progress, calibrate, load, measure
from onnx_lowrank.report import ModelFacts, Report, Verdict
from onnx_lowrank.rewrite import check_matches, rewritten
from onnx_lowrank.runtime import Feed, Session
from onnx_lowrank.sensitivity import sensitivities
from onnx_lowrank.settings import Settings
from onnx_lowrank.validation import References
from onnx_lowrank.verify import Measured, facts, facts_of, measured, publish, race_files, staging

_GIVE_BACK_ROUNDS = 6
_PROBE_SECONDS = 60.0


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
    del stage, done, total


class _Clock:
    """Passes progress on and counts the seconds of each stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._stage, self._since = progress, "", time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = round(self.seconds.get(self._stage, 0.0) + now - self._since, 3)
        self._stage, self._since = stage, now
        self._progress(stage, done, total)


@dataclasses.dataclass
class _Run:
    """Everything known about one model on the way through; the steps below fill it in order."""

    loaded: Loaded
    settings: Settings
    fits: Mapping[str, Fit]
    references: References
    clock: _Clock
    probes: References
    table: LatencyTable
    frontier: list[dict[str, float]] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def loss_of(self, decisions: tuple[Decision, ...]) -> float:
        """Measured loss of the built model on the held-out samples."""
        return self._loss(decisions, self.references)

    def probe_loss(self, decision: Decision) -> float:
        """Loss on a few calibration samples when only one site is rewritten."""
        return self._loss((decision,), self.probes)

    def _loss(self, decisions: tuple[Decision, ...], references: References) -> float:
        loaded = self.loaded
        model = rewritten(loaded.file, loaded.sites, self.fits, decisions)
        session = Session(model, provider=self.settings.provider, threads=0, folder=loaded.file.folder)
        return references.loss(session).value()


def _start(path: Path, data: object, settings: Settings, clock: _Clock, nodes: Iterable[str] | None = None) -> _Run:
    loaded = load(path, data, settings, clock)
    if nodes is not None:
        wanted = set(nodes)
        loaded = dataclasses.replace(loaded, sites=tuple(s for s in loaded.sites if s.name in wanted))
    fits = calibrate(loaded, loaded.sites, settings, clock)
    clock("reference", 0, 1)
    original = Session(path, provider=settings.provider, threads=0)
    references = References(original, loaded.held_out)
    seconds = _seconds(original, loaded.first)
    count = int(_PROBE_SECONDS / max(seconds * len(loaded.sites), 1e-9))
    probes = References(original, list(itertools.islice(loaded.calibration, min(max(count, 4), 16))))
    clock("reference", 1, 1)
    table = LatencyTable(settings.cache, provider=settings.provider, threads=settings.threads, seed=settings.seed)
    run = _Run(loaded, settings, fits, references, clock, probes, table)
    if loaded.shared:
        run.warnings.append("one sample only: the loss was measured on the sample that the factors were fitted to")
    if loaded.source.synthetic:
        run.warnings.append("no data given: the loss was measured on synthetic inputs, not on real data")
    return run


def _seconds(session: Session, feed: Feed) -> float:
    """Wall time of one run that is not the first."""
    session.run(feed)
    since = time.perf_counter()
    session.run(feed)
    return time.perf_counter() - since


def _decide(run: _Run, data: tuple[str, ...]) -> Plan:
    """Measure candidates, probe sensitivities, and search the frontier with built models until the loss holds."""
    loaded, settings = run.loaded, run.settings
    choices = measure(loaded.sites, run.fits, run.table, settings, run.clock)
    weights = sensitivities(choices, run.probe_loss, lambda done, total: run.clock("probe", done, total))
    choices = [c.weighted(weights[c.dense.node]) if c.dense.node in weights else c for c in choices]
    plans = frontier(choices)
    predicted = {decisions: loss for loss, decisions in plans}

    def loss_of(decisions: tuple[Decision, ...]) -> float:
        run.clock("decide", len(run.frontier), len(run.frontier) + 1)
        loss = run.loss_of(decisions)
        run.frontier.append(_point(decisions, predicted[decisions], loss))
        return loss

    best = search(plans, loss_of, settings.max_loss)
    run.clock("decide", 1, 1)
    decisions = best or tuple(decide(c, 0.0, 1.0) for c in choices)
    return Plan(
        model_sha256=loaded.file.sha256,
        decisions=decisions,
        max_loss=settings.max_loss,
        provider=settings.provider,
        threads=settings.threads,
        seed=settings.seed,
        samples=settings.samples,
        data=data,
        shapes=tuple(sorted(settings.shapes.items())),
    )


def _point(decisions: tuple[Decision, ...], predicted: float, loss: float) -> dict[str, float]:
    ms = sum(d.ms_after or d.ms_before or 0.0 for d in decisions)
    return {"rewritten": sum(d.kind is not None for d in decisions), "ms": ms, "predicted": predicted, "loss": loss}


def analyze(
    model: str | Path, *, data: Any = None, progress: Progress = silent, command: str = "", **choices: Any
) -> Report:
    """What could be won, site by site; writes nothing. The speed-up is the sum of the measured fragments' gains.

    Raises:
        LowRankError: one line that says what is wrong.
    """
    settings, clock = Settings.from_table(choices), _Clock(progress)
    run = _start(Path(model), data, settings, clock)
    plan = _decide(run, _data_names(data))
    race = race_files([run.loaded.file.path], run.loaded, settings, settings.threads)
    reason = f"would rewrite {len(plan.rewritten)} of {len(plan.decisions)} sites"
    verdict = _verdict(run, "unchanged", reason, None, loss=0.0)
    before = facts(run.loaded.file, run.loaded)
    return _report(run, plan, verdict, before, before, tuple(race), command)


def optimize(
    model: str | Path,
    out: str | Path,
    *,
    data: Any = None,
    in_place: bool = False,
    external_data: bool | None = None,
    progress: Progress = silent,
    command: str = "",
    **choices: Any,
) -> Report:
    """Write a model that is measured, on the saved file, to be faster within the loss; else the original unchanged.

    Args:
        model: path of an ONNX file.
        out: where the result goes; never partial.
        data: path or paths as on the command line, or an iterable of dicts; None is synthetic.
        external_data: True writes weights beside the model; None does so where the model did.
        choices: fields of `Settings`.

    Raises:
        LowRankError: one line that says what is wrong; nothing was written.
    """
    settings, clock = Settings.from_table(choices), _Clock(progress)
    out = Path(out)
    check_output(out, Path(model), in_place=in_place)
    run = _start(Path(model), data, settings, clock)
    plan = _decide(run, _data_names(data))
    return _finish(run, plan, out, external_data, command, give_back=True)


def apply(
    plan: str | Path | Plan,
    model: str | Path,
    out: str | Path,
    *,
    data: Any = None,
    in_place: bool = False,
    external_data: bool | None = None,
    progress: Progress = silent,
    command: str = "",
    **choices: Any,
) -> Report:
    """Replay a plan: same kinds and ranks, factors fitted to the same samples, verified as `optimize` does.

    On the model that the plan was made for the result has the same bytes.

    Raises:
        SettingsError: the plan is for another graph.
        VerificationError: the saved file does not hold the plan's loss, or is not faster.
    """
    if not isinstance(plan, Plan):
        plan = read_plan(Path(plan))
    asked = dict(max_loss=plan.max_loss, provider=plan.provider, threads=plan.threads, seed=plan.seed)
    settings = Settings.from_table({**asked, "samples": plan.samples, "shapes": dict(plan.shapes), **choices})
    clock, out = _Clock(progress), Path(out)
    check_output(out, Path(model), in_place=in_place)
    run = _start(Path(model), data if data is not None else list(plan.data) or None, settings, clock,
                 [d.node for d in plan.decisions])  # fmt: skip
    check_matches(plan.decisions, run.loaded.sites)
    if run.loaded.file.sha256 != plan.model_sha256:
        run.warnings.append("the plan was made for another file of this graph: the factors were fitted anew")
    return _finish(run, plan, out, external_data, command, give_back=False)


def read_plan(path: Path) -> Plan:
    """A plan file.

    Raises:
        SettingsError: missing, unreadable, or not a plan.
    """
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as fault:
        raise SettingsError(f"{path}: cannot read the plan ({fault})") from None


def _data_names(data: Any) -> tuple[str, ...]:
    if isinstance(data, str | Path):
        return (str(data),)
    if isinstance(data, list | tuple) and all(isinstance(d, str | Path) for d in data):
        return tuple(str(d) for d in data)
    return ()


def _finish(
    run: _Run, plan: Plan, out: Path, external_data: bool | None, command: str, *, give_back: bool
) -> Report:
    file = run.loaded.file
    external = file.external if external_data is None else external_data
    before = facts(file, run.loaded)
    with staging(out) as staged:
        found: Measured | None = None
        for attempt in range(_GIVE_BACK_ROUNDS):
            if not plan.rewritten:
                break
            run.clock("verify", attempt, _GIVE_BACK_ROUNDS)
            built = rewritten(file, run.loaded.sites, run.fits, plan.decisions)
            write_model(built, staged, folder=file.folder, external=external)
            found = measured(staged, run.loaded, run.references, run.settings)
            if _holds(found, run.settings):
                break
            if not give_back:
                raise VerificationError(_failure(found, run.settings))
            plan, found = plan.giving_back(_worst(plan, found, run.settings)), None
        run.clock("verify", 1, 1)
        if found is None:
            return _unchanged(run, plan, before, out, command)
        return _publish(run, plan, found, before, staged, out, command)


def _holds(found: Measured, settings: Settings) -> bool:
    return found.loss <= settings.max_loss and found.latency.ratio.low > 1


def _failure(found: Measured, settings: Settings) -> str:
    ratio = found.latency.ratio
    return (
        f"the rewritten model has loss {found.loss:.3g} (limit {settings.max_loss:g}) and speed-up {ratio.value:.3f} "
        f"({ratio.low:.3f}–{ratio.high:.3f}); nothing was written, run optimize to make a plan that holds here"
    )


def _worst(plan: Plan, found: Measured, settings: Settings) -> list[str]:
    """Which sites to give back: the one that loses most, or the half that gains least."""
    if found.loss > settings.max_loss:
        return [max(plan.rewritten, key=lambda d: d.error or 0.0).node]
    ranked = sorted(plan.rewritten, key=lambda d: (d.ms_after or 0.0) / (d.ms_before or 1.0), reverse=True)
    return [d.node for d in ranked[: max(1, (len(ranked) + 1) // 2)]]


def _unchanged(run: _Run, plan: Plan, before: ModelFacts, out: Path, command: str) -> Report:
    if run.settings.require_speedup is not None:
        raise RequirementError(f"no speed-up within loss {run.settings.max_loss:g}; nothing was written")
    copy_model(run.loaded.file, out)
    counts: dict[str, int] = {}
    for decision in plan.decisions:
        if decision.why is not None:
            counts[decision.why.value] = counts.get(decision.why.value, 0) + 1
    why = "; ".join(f"{n} × {text}" for text, n in sorted(counts.items(), key=lambda c: -c[1]))
    reason = f"nothing pays here ({why})" if why else "no site can be factored"
    after = dataclasses.replace(before, path=str(out))
    return _report(run, plan, _verdict(run, "unchanged", reason, None, loss=0.0), before, after, (), command)


def _publish(
    run: _Run, plan: Plan, found: Measured, before: ModelFacts, staged: Path, out: Path, command: str
) -> Report:
    wanted, ratio = run.settings.require_speedup, found.latency.ratio
    if wanted is not None and ratio.low < wanted:
        raise RequirementError(
            f"speed-up {ratio.value:.3f} ({ratio.low:.3f}–{ratio.high:.3f}) is not surely {wanted:g}; nothing was written"
        )
    default = race_files([run.loaded.file.path, staged], run.loaded, run.settings, threads=0, seconds=8.0)[0]
    if default.ratio.low <= 1:
        run.warnings.append(
            f"at the runtime's default thread count the ratio is {default.ratio.value:.2f} "
            f"({default.ratio.low:.2f}–{default.ratio.high:.2f}): the gain is not sure there"
        )
    after = facts_of(staged, run.loaded, out)
    publish(staged, out)
    reason = f"{len(plan.rewritten)} of {len(plan.decisions)} sites rewritten"
    verdict = _verdict(run, "optimized", reason, found, loss=found.loss)
    return _report(run, plan, verdict, before, after, (found.latency, default), command)


def _verdict(run: _Run, status: str, reason: str, found: Measured | None, *, loss: float) -> Verdict:
    dtypes = {site.geometry.dtype for site in run.loaded.sites}
    return Verdict(
        status=status,
        reason=reason,
        speedup=found.latency.ratio if found else no_change(),
        loss=loss,
        loss_limit=run.settings.max_loss,
        data="synthetic" if run.loaded.source.synthetic else "user",
        samples=run.references.count,
        provider=run.settings.provider,
        precision="+".join(sorted(dtypes)) or "as the model is",
    )


def _report(
    run: _Run, plan: Plan, verdict: Verdict, before: ModelFacts, after: ModelFacts,
    latency: tuple[Latency, ...], command: str,
) -> Report:  # fmt: skip
    run.clock("report", 1, 1)
    return Report(
        verdict=verdict,
        before=before,
        after=after,
        plan=plan,
        kept=run.loaded.kept,
        frontier=tuple(run.frontier),
        latency=latency,
        staircases=run.table.rows({site.geometry for site in run.loaded.sites}),
        seconds=run.clock.seconds,
        command=command,
        warnings=tuple(run.warnings),
    )
