"""Any ONNX models side by side: paired latency and distance of their outputs, ours or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx_lowrank import measure
from onnx_lowrank.errors import ModelError, SettingsError
from onnx_lowrank.files import read_model
from onnx_lowrank.hardware import card
from onnx_lowrank.measure import Latency
from onnx_lowrank.metrics import new_loss
from onnx_lowrank.prepare import open_inputs
from onnx_lowrank.report import environment
from onnx_lowrank.runtime import Session
from onnx_lowrank.settings import Settings
from onnx_lowrank.validation import References


@dataclasses.dataclass(frozen=True)
class Row:
    """One model against the first: bytes, parameters, relative loss, paired latency (None for the first)."""

    path: str
    bytes: int
    parameters: int
    loss: float
    latency: Latency | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The models in the order given; the first is the baseline."""

    rows: tuple[Row, ...]
    data: str
    samples: int
    provider: str
    threads: int
    hardware: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Stable keys, schema 1."""
        rows = [{**_plain(row), "latency": row.latency.to_dict() if row.latency else None} for row in self.rows]
        return {
            "schema": 1,
            "models": rows,
            "data": self.data,
            "samples": self.samples,
            "provider": self.provider,
            "threads": self.threads,
            "environment": environment() | self.hardware,
        }


def _plain(row: Row) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}


def compare(models: Sequence[str | Path], *, data: Any = None, **choices: Any) -> Comparison:
    """Time models turn about against the first and measure how far their outputs are from its outputs.

    Args:
        models: two or more files with the same inputs.
        data: as for `optimize`; None is synthetic.
        choices: fields of `Settings` (provider, threads, samples, shapes, seed).

    Raises:
        LowRankError: a model that does not load, or whose inputs are not the first one's.
    """
    settings = Settings.from_table(choices)
    paths = [Path(m) for m in models]
    if len(paths) < 2:
        raise SettingsError("compare needs two models or more")
    files = [read_model(path) for path in paths]
    first = Session(paths[0], provider=settings.provider, threads=0)
    source, feeds = open_inputs(first, data, settings)
    counter = new_loss(settings.metric, first.output_names, settings.output_weights)
    references = References(first, source, counter)
    losses = [_loss(path, references, settings) for path in paths]
    latencies = measure.race(paths, feeds[0], provider=settings.provider, threads=settings.threads, seed=settings.seed)
    rows = [
        Row(str(path), file.bytes, measure.parameters(file.model), loss, latency)
        for path, file, loss, latency in zip(paths, files, losses, [None, *latencies], strict=True)
    ]
    around = card(settings.provider)
    kind = "synthetic" if source.synthetic else "user"
    return Comparison(tuple(rows), kind, references.count, str(settings.provider), settings.threads, around)


def _loss(path: Path, references: References, settings: Settings) -> float:
    session = Session(path, provider=settings.provider, threads=0, purpose="verify")
    if missing := [name for name in references.outputs if name not in session.output_names]:
        raise ModelError(f"{path}: has no output '{missing[0]}'; compare models with the same inputs and outputs")
    try:
        return references.loss(session).value()
    except ModelError as fault:
        raise ModelError(f"{path}: {fault}") from None
