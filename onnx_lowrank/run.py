"""One model on its way: what is known of it, up to the plan. Nothing is written here."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onnx_lowrank.allocate import decide, frontier, search
from onnx_lowrank.latency import LatencyTable
from onnx_lowrank.plan import Decision, Plan
from onnx_lowrank.prepare import Fit, Loaded, Progress, calibrate, load, measure
from onnx_lowrank.rewrite import rewritten
from onnx_lowrank.runtime import Feed, Session, with_outputs
from onnx_lowrank.sensitivity import sensitivities
from onnx_lowrank.settings import Settings
from onnx_lowrank.validation import References

_PROBE_SECONDS = 60.0


class Clock:
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
class Run:
    """Everything known about one model on the way through; the steps below fill it in order."""

    loaded: Loaded
    settings: Settings
    fits: Mapping[str, Fit]
    references: References
    clock: Clock
    probes: References
    table: LatencyTable
    frontier: list[dict[str, float]] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def loss_of(self, decisions: tuple[Decision, ...]) -> float:
        """Measured loss of the built model on the held-out samples."""
        return self._loss(decisions, self.references, None)

    def probe_loss(self, decision: Decision) -> float:
        """Loss on a few calibration samples, before a final Softmax, when only one site is rewritten."""
        return self._loss((decision,), self.probes, self.loaded.graph.smooth_outputs())

    def _loss(self, decisions: tuple[Decision, ...], references: References, outputs: list[str] | None) -> float:
        loaded = self.loaded
        model = rewritten(loaded.file, loaded.sites, self.fits, decisions)
        if outputs is not None:
            model = with_outputs(model, outputs)
        session = Session(model, provider=self.settings.provider, threads=0, folder=loaded.file.folder)
        return references.loss(session).value()


def start(path: Path, data: Any, settings: Settings, clock: Clock, nodes: Iterable[str] | None = None) -> Run:
    """Load, calibrate and run the original; `nodes` restricts the sites to those of a plan."""
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
    smooth = with_outputs(loaded.file.model, loaded.graph.smooth_outputs())
    probed = Session(smooth, provider=settings.provider, threads=0, folder=loaded.file.folder)
    probes = References(probed, list(itertools.islice(loaded.calibration, min(max(count, 4), 16))))
    clock("reference", 1, 1)
    table = LatencyTable(settings.cache, provider=settings.provider, threads=settings.threads, seed=settings.seed)
    run = Run(loaded, settings, fits, references, clock, probes, table)
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


def decide_plan(run: Run, data: tuple[str, ...]) -> Plan:
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
    return {
        "rewritten": sum(d.kind is not None for d in decisions),
        "ms": ms,
        "predicted": predicted,
        "loss": min(loss, 1e30),
    }
