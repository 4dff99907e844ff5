"""Original, precision alone, low rank alone, both: timed turn about in one race, with bytes and loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_lowrank import measure, sessions
from onnx_lowrank.files import read_model
from onnx_lowrank.measure import Latency
from onnx_lowrank.plan import Plan
from onnx_lowrank.run import Run
from onnx_lowrank.runtime import Session
from onnx_lowrank.timing import Ratio

_SECONDS = 30.0
_ALONE = 1  # place of the precision alone


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


def columns_of(run: Run, plan: Plan, staged: Path, loss: float) -> tuple[tuple[Latency, ...], tuple[Column, ...]]:
    """Latency of the saved file against the original at every shape, and the columns at the first one.

    Two columns where no site was factored: the original and the precision alone, which is the saved file.

    Args:
        loss: of the saved file.
    """
    settings, file = run.settings, run.loaded.file
    assert run.lowering is not None
    name = run.lowering.scheme.precision
    models: list[Path | onnx.ModelProto] = [file.path, staged]
    names, losses = ["original", f"{name} alone"], [0.0, loss]
    if plan.rewritten:
        factored = run.build(plan.decisions)
        models = [file.path, run.deployed(()), factored, staged]
        names += ["low rank alone", f"low rank and {name}"]
        losses = [0.0, run.base_loss, _loss(run, factored), loss]
    where: dict[str, Any] = {"provider": settings.provider, "threads": settings.threads, "folder": file.folder}
    races = [
        measure.race(models, feed, **where, seed=settings.seed, seconds=_SECONDS, streams=settings.streams)
        for feed in run.loaded.feeds
    ]
    sizes = [_bytes(run, model) for model in models]
    return tuple(race[-1] for race in races), tuple(_columns(names, sizes, losses, races[0]))


def _columns(
    names: Sequence[str], sizes: Sequence[int], losses: Sequence[float], race: Sequence[Latency]
) -> Iterator[Column]:
    """Every model with its ratio to the original and to the precision alone, out of the rounds of one race."""
    times = [np.asarray(runs["samples_ms"]) for runs in (race[0].before, *(entry.after for entry in race))]
    for place, name in enumerate(names):
        over = sessions.ratio(times[_ALONE], times[place], race[0].groups) if place != _ALONE else None
        ratio = race[place - 1].ratio if place else None
        yield Column(name, sizes[place], losses[place], float(np.median(times[place])), ratio, over)


def _bytes(run: Run, model: Path | onnx.ModelProto) -> int:
    if isinstance(model, Path):
        return run.loaded.file.bytes if model == run.loaded.file.path else read_model(model).bytes
    return int(model.ByteSize())


def _loss(run: Run, model: onnx.ModelProto) -> float:
    session = Session(model, provider=run.settings.provider, threads=0, folder=run.loaded.file.folder)
    return run.references.loss(session).value()
