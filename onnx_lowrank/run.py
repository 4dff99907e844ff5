"""One model on its way: what is known of it, up to the plan. Nothing is written here."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_lowrank.calibration import Fits
from onnx_lowrank.errors import SettingsError
from onnx_lowrank.files import check_copy
from onnx_lowrank.fitting import calibrate
from onnx_lowrank.latency import LatencyTable, machine
from onnx_lowrank.linalg import Metric
from onnx_lowrank.memory import give_back
from onnx_lowrank.metrics import new_loss
from onnx_lowrank.passes.nystrom import NYSTROM
from onnx_lowrank.passes.shared import SHARED
from onnx_lowrank.plan import Decision, Plan
from onnx_lowrank.precision import Lowering
from onnx_lowrank.prepare import Loaded, Progress, load
from onnx_lowrank.resume import Stages, run_key
from onnx_lowrank.rewrite import Latest, check_matches, rewritten
from onnx_lowrank.runtime import Feed, Session, version
from onnx_lowrank.saving import check_room
from onnx_lowrank.scheme import Scheme
from onnx_lowrank.schemes import Way, check_precision, choose_lowering
from onnx_lowrank.settings import Settings
from onnx_lowrank.validation import NewLoss, References, upper_end
from onnx_lowrank.weighing import with_metrics

Pairs = Iterable[tuple[Feed, list[Any]]]
"""Samples, each with the original's outputs."""

_FITTED = 3  # samples that are fitted to for each that is held out
_KEPT = 2**30  # bytes of outputs on them that may lie on disk


class Clock:
    """Passes progress on, counts the seconds of each stage, and gives back what the last one has freed."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._stage, self._since = progress, "", time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, cost: str = "") -> None:
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = round(self.seconds.get(self._stage, 0.0) + now - self._since, 3)
        if stage != self._stage:
            give_back()
        self._stage, self._since = stage, now
        self._progress(f"{stage}: {cost}" if cost else stage, done, total)


@dataclasses.dataclass
class Run:
    """Everything known about one model on the way through; the steps fill it in order.

    `witnesses` gives the samples that were fitted to, each with the original's outputs.
    `fits` are made on the original's own activations until some of them are repaired. `lowering` makes the precision
    that will be deployed, None where that is the model's own; `ways` were measured to choose it, and `base_loss` is
    the loss of the original in it.
    """

    loaded: Loaded
    settings: Settings
    fits: Fits
    references: References
    witnesses: Callable[[], Pairs]
    clock: Clock
    table: LatencyTable
    stages: Stages = dataclasses.field(default_factory=lambda: Stages(None, ""))
    frontier: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    probes: dict[str, Any] = dataclasses.field(default_factory=dict)
    additivity: dict[str, Any] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)
    lowering: Lowering | None = None
    ways: tuple[Way, ...] = ()
    base_loss: float = 0.0
    latest: Latest = dataclasses.field(default_factory=Latest)

    def build(self, decisions: Sequence[Decision], *, provenance: bool = True) -> onnx.ModelProto:
        """The model with every decision carried out, in its own precision."""
        known = (self.loaded.file, self.loaded.sites, self.fits, decisions, self.latest)
        made = rewritten(*known, provenance=provenance)
        return self.loaded.opening.closed(made)

    def deployed(self, decisions: Sequence[Decision], *, provenance: bool = True) -> onnx.ModelProto:
        """The model with every decision carried out, in the precision that will be deployed."""
        if self.lowering is None:
            return self.build(decisions, provenance=provenance)
        known = (self.loaded.file, self.loaded.sites, self.fits, decisions, self.latest)
        return self.lowering.model(rewritten(*known, provenance=provenance, closed=False))

    def loss_of(self, decisions: Sequence[Decision]) -> float:
        """Loss of the built model, as far as the held-out samples are sure of it (`confidence`)."""
        return upper_end(self.references.loss(self._session(decisions)), self.settings.sure)

    def loss_of_all(self, decisions: Sequence[Decision]) -> float:
        """The same, or that over all samples where it is larger: those that the factors were fitted to among them."""
        self.clock("witness", 0, 1)
        session = self._session(decisions)
        counted = self.references.loss(session)
        apart = upper_end(counted, self.settings.sure)
        for sample, reference in self.witnesses():
            counted.add(reference, session.run(sample, self.references.outputs))
        self.clock("witness", 1, 1)
        return max(apart, upper_end(counted, self.settings.sure))

    def _session(self, decisions: Sequence[Decision]) -> Session:
        model, folder = self.deployed(decisions), self.loaded.file.folder
        return Session(model, provider=self.settings.provider, threads=0, folder=folder)


def start(
    path: Path, data: Any, settings: Settings, clock: Clock, plan: Plan | None = None, outs: Sequence[Path] = ()
) -> Run:
    """Load, calibrate and run the original.

    Args:
        outs: where results will go; there has to be room for each, and they may not cost any model its weights.
        plan: one that is replayed; only the sites that it rewrites are calibrated.

    Raises:
        SettingsError: the plan is for another graph, the disk is full, or as `check_copy`.
    """
    _check_table(settings, plan)
    loaded = load(path, data, settings, clock, plan.merges if plan else None)
    for out in outs:
        check_copy(loaded.file, out)
        check_room(out, loaded.file.bytes)
    decided, rewritten_sites = None, None
    if plan is not None:
        check_matches(plan.decisions, loaded.sites)
        wanted = {d.node for d in plan.decisions}
        loaded = dataclasses.replace(loaded, sites=tuple(s for s in loaded.sites if s.name in wanted))
        decided = unrepaired(plan)
        rewritten_sites = {d.node for d in plan.rewritten} | {node for r in plan.refits for node, *_ in r.ranks}
    dtypes = {site.geometry.dtype for site in loaded.sites}
    precision = check_precision(loaded.file.model, settings.precision, dtypes, loaded.file.bytes)
    table = None if precision else latency_table(settings)
    names = [output.name for output in loaded.file.model.graph.output]
    counter = new_loss(settings.metric, names, settings.output_weights)
    stages = _stages(loaded, settings)
    metrics, fits = stages.recall("fits", lambda: _calibrated(loaded, settings, clock, rewritten_sites, decided))
    loaded = dataclasses.replace(loaded, metrics=metrics)
    references = _references(loaded, settings, counter, clock)
    settings = _as_sure_as(references.count, settings)
    lower = functools.partial(choose_lowering, loaded, settings, references, precision, _stage(clock))
    lowering, ways = _lowering(lower, plan.scheme if plan else None, stages if precision else Stages(None, ""))
    table = table or latency_table(settings, lowering)
    witnesses = _witnesses(loaded, settings, references)
    run = Run(loaded, settings, fits, references, witnesses, clock, table, stages, lowering=lowering, ways=ways)
    run.base_loss = run.loss_of(()) if lowering else 0.0
    run.warnings += _warnings(loaded, table, references.count)
    return run


def _lowering(
    lower: Callable[[Scheme | None], tuple[Lowering | None, tuple[Way, ...]]], planned: Scheme | None, stages: Stages
) -> tuple[Lowering | None, tuple[Way, ...]]:
    """The lowering of a plan, or the one that an earlier run has chosen, or a new one."""
    fresh: list[Lowering | None] = []

    def made() -> tuple[Scheme | None, tuple[Way, ...]]:
        lowering, ways = lower(planned)
        fresh.append(lowering)
        return lowering.scheme if lowering else None, ways

    scheme, ways = stages.recall("scheme", made)
    return fresh[0] if fresh else lower(scheme)[0], ways


def _calibrated(
    loaded: Loaded,
    settings: Settings,
    clock: Clock,
    names: Collection[str] | None,
    decided: Mapping[str, Sequence[str]] | None,
) -> tuple[Mapping[str, Metric], Fits]:
    """Metrics of the sites' outputs (of the named ones, where names are given), and all fits."""
    clock("weigh", 0, 1)
    weighed = with_metrics(loaded, settings, names)
    return weighed.metrics, calibrate(weighed, settings, clock, decided)


def _references(loaded: Loaded, settings: Settings, counter: NewLoss, clock: Clock) -> References:
    clock("reference", 0, 1)
    original = Session(loaded.file.path, provider=settings.provider, threads=0)  # gone before the next one is opened
    found = References(original, loaded.held_out, counter)
    clock("reference", 1, 1)
    return found


def _witnesses(loaded: Loaded, settings: Settings, references: References) -> Callable[[], Pairs]:
    """The outputs on the samples that were fitted to stay on disk once they are asked for, where they take little."""

    def original() -> Session:
        return Session(loaded.file.path, provider=settings.provider, threads=0)

    def streamed() -> Pairs:
        session = original()
        return ((sample, session.run(sample, references.outputs)) for sample in loaded.calibration)

    if _FITTED * references.bytes > _KEPT:
        return streamed
    return functools.cache(lambda: References(original(), loaded.calibration, references.new_loss))


def _as_sure_as(count: int, settings: Settings) -> Settings:
    """The settings with a confidence that so many held-out samples can give.

    Raises:
        SettingsError: more was asked for.
    """
    if count > 1 or settings.sure == 0.5:
        return settings
    if settings.confidence is not None:
        raise SettingsError(f"confidence {settings.confidence:g} needs two held-out samples or more; give more data")
    return dataclasses.replace(settings, confidence=0.5)


def _warnings(loaded: Loaded, table: LatencyTable, held_out: int) -> Iterator[str]:
    if loaded.shared:
        yield "one sample only: the loss was measured on the sample that the factors were fitted to"
    elif held_out == 1:
        yield "one held-out sample does not tell what others lose: the limit was held on it alone; give more samples"
    if loaded.source.synthetic:
        yield "no data given: the loss was measured on synthetic inputs, not on real data"
    if table.given:
        yield f"latencies are those of {table.path}, measured on {machine(table.environment)}"


def _check_table(settings: Settings, plan: Plan | None) -> None:
    if plan is None and not settings.verify_latency and not settings.cache.is_file():
        raise SettingsError(
            f"{settings.cache}: no table; --no-verify-latency plans with one of the machine that is not here: "
            "write it there with `cache export table.json` and give --cache table.json"
        )


def _stages(loaded: Loaded, settings: Settings) -> Stages:
    """The stages that an earlier run of the same model, data and settings has finished."""
    if settings.resume is None:
        return Stages(None, "")
    key = run_key(loaded.file.sha256, settings, loaded.source, f"{version()} numpy {np.__version__}")
    return Stages(settings.resume, key)


def latency_table(settings: Settings, lowering: Lowering | None = None) -> LatencyTable:
    """The table of times for these settings, of a precision where one is made."""
    place, where = settings.cache, {"provider": settings.provider, "threads": settings.threads}
    return LatencyTable(place, **where, seed=settings.seed, lowering=lowering)  # type: ignore[arg-type]


def _stage(clock: Clock) -> Callable[[int, int], None]:
    return lambda done, total: clock("lower", done, total)


def unrepaired(plan: Plan) -> dict[str, tuple[str, ...]]:
    """The kinds by node whose fits on the original's activations a replay uses: before a repair, or without one.

    The order of a layer's channels and the projections that sites share stay those of the original's activations.
    """
    used: dict[str, set[str]] = {}
    kept: set[str] = set()
    for decisions, repaired in (*((r.plan(plan.decisions), r.kept) for r in plan.refits), (plan.decisions, ())):
        kept.update(repaired)
        for d in decisions:
            if d.kind and (d.node not in kept or d.kind in (NYSTROM, SHARED)):
                used.setdefault(d.node, set()).add(d.kind)
    return {node: tuple(sorted(kinds)) for node, kinds in used.items()}
