"""Original, precision alone, low rank alone, both: timed turn about in one race, with bytes and loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx

from onnx_lowrank import measure, timing
from onnx_lowrank.files import read_model
from onnx_lowrank.measure import Latency
from onnx_lowrank.plan import Plan
from onnx_lowrank.run import Run
from onnx_lowrank.runtime import Session
from onnx_lowrank.timing import Ratio

_SECONDS = 30.0
_ALONE, _LAST = 1, 3  # places of the precision alone and of both


@dataclasses.dataclass(frozen=True)
class Column:
    """One of the four models.

    Attributes:
        bytes: of the file, or of what it would be.
        ratio: of the original's time over this one's; None for the original.
        over: of the precision alone over this one; None for it.
    """

    name: str
    bytes: int
    loss: float
    p50_ms: float
    ratio: Ratio | None
    over: Ratio | None

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        row: dict[str, Any] = {k: getattr(self, k) for k in ("name", "bytes", "loss", "p50_ms")}
        for key, ratio in (("ratio", self.ratio), ("over_precision", self.over)):
            row[key] = ratio.value if ratio else None
            row[f"{key}_ci"] = [ratio.low, ratio.high] if ratio else None
        return row


def columns_of(run: Run, plan: Plan, staged: Path) -> tuple[tuple[Latency, ...], tuple[Column, ...]]:
    """Latency of the saved file against the original at every shape, and the columns at the first one.

    Two columns where no site was factored: the original and the precision alone, which is the saved file.
    """
    settings, file = run.settings, run.loaded.file
    assert run.lowering is not None
    name = run.lowering.scheme.precision
    models: list[Path | onnx.ModelProto] = [file.path, staged]
    names = ["original", f"{name} alone"]
    if plan.rewritten:
        models = [file.path, run.deployed(()), run.build(plan.decisions), staged]
        names += ["low rank alone", f"low rank and {name}"]
    where: dict[str, Any] = {"provider": settings.provider, "threads": settings.threads, "folder": file.folder}
    races = [
        measure.raced(models, feed, **where, seed=settings.seed, seconds=_SECONDS, rounds=60)
        for feed in run.loaded.feeds
    ]
    latency = tuple(
        measure.latencies(times, clock, feed, threads=settings.threads, seed=settings.seed)[-1]
        for feed, (times, clock) in zip(run.loaded.feeds, races, strict=True)
    )
    times = races[0][0][:, 1:]
    columns = []
    for place, (called, model) in enumerate(zip(names, models, strict=True)):
        ratios = [timing.paired_ratio(times[:, base], times[:, place], seed=settings.seed) for base in (0, _ALONE)]
        columns.append(
            Column(
                called,
                _bytes(run, model),
                0.0 if place == 0 else _loss(run, model),
                float(timing.summary(times[:, place])["p50_ms"]),
                ratios[0] if place else None,
                ratios[1] if place != _ALONE else None,
            )
        )
    return latency, tuple(columns)


def _bytes(run: Run, model: Path | onnx.ModelProto) -> int:
    if isinstance(model, Path):
        return run.loaded.file.bytes if model == run.loaded.file.path else read_model(model).bytes
    return int(model.ByteSize())


def _loss(run: Run, model: Path | onnx.ModelProto) -> float:
    session = Session(model, provider=run.settings.provider, threads=0, folder=run.loaded.file.folder)
    return run.references.loss(session).value()
