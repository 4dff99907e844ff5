"""The saved file, loaded and measured against the original: loss on held-out samples, paired latency."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import onnx

from onnx_lowrank import measure
from onnx_lowrank.columns import Column
from onnx_lowrank.files import ModelFile, read_model
from onnx_lowrank.measure import Latency
from onnx_lowrank.prepare import Loaded
from onnx_lowrank.providers import Provider
from onnx_lowrank.report import ModelFacts
from onnx_lowrank.runtime import Session, profile
from onnx_lowrank.settings import Settings
from onnx_lowrank.timing import Ratio
from onnx_lowrank.validation import Loss, References, upper_end


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a file on disk is worth; one latency for every set of shapes, or a ratio that was only predicted.

    `counted` is the loss sample by sample; `columns` are there where a precision was made; `start` is what the first
    opening on a card took, where engines are built.
    """

    loss: float
    latency: tuple[Latency, ...]
    counted: Loss | None = None
    columns: tuple[Column, ...] = ()
    predicted: float | None = None
    start: dict[str, float] = dataclasses.field(default_factory=dict)

    def loss_at(self, confidence: float) -> float:
        """What the loss is below with a confidence, on samples like the held-out ones."""
        return self.loss if self.counted is None else upper_end(self.counted, confidence)

    @property
    def sample_losses(self) -> tuple[float, ...]:
        """Loss of each sample alone."""
        return () if self.counted is None else tuple(self.counted.per_sample)

    @property
    def faster(self) -> bool:
        """Whether every interval, which holds the noise of the control, lies above 1 and above the control's ratio.

        Of a machine that is not here: whether the ratio is predicted to. Where a precision was made, the model in it
        must also be faster than the precision alone.
        """
        if self.predicted is not None:
            return self.predicted > 1
        if any(column.over is not None and column.over.low <= 1 for column in self.columns[3:]):
            return False
        return all(entry.ratio.low > max(1.0, entry.aa.value) for entry in self.latency)

    @property
    def speedup(self) -> Ratio:
        """The least ratio over the shapes."""
        if self.predicted is not None:
            return Ratio(self.predicted, self.predicted, self.predicted)
        return min((entry.ratio for entry in self.latency), key=lambda ratio: ratio.low)


def measured(staged: Path, loaded: Loaded, references: References, settings: Settings) -> Measured:
    """Loss and latency of a saved file against the original file; no latency where the machine is not here."""
    start = _first_opening(staged, loaded, settings)
    counted = loss_of_file(staged, references, settings)
    timed = settings.verify_latency
    latency = race_files([loaded.file.path, staged], loaded, settings, settings.threads) if timed else ()
    return Measured(counted.value(), latency, counted, start=start)


def _first_opening(staged: Path, loaded: Loaded, settings: Settings) -> dict[str, float]:
    """Milliseconds to load a file and to run it once, before any of its engines is kept; on a card only."""
    if not Provider.of(settings.provider).on_device:
        return {}
    feed, folder = loaded.feeds[0], loaded.file.folder
    one = measure.opened(staged, feed, provider=settings.provider, threads=settings.threads, folder=folder)
    return {"load_ms": one.load_ms, "first_run_ms": one.first_run_ms}


def loss_of_file(staged: Path, references: References, settings: Settings) -> Loss:
    """Loss of a saved file."""
    return references.loss(Session(staged, provider=settings.provider, threads=0, purpose="verify"))


def race_files(
    models: Sequence[Path | onnx.ModelProto], loaded: Loaded, settings: Settings, threads: int, seconds: float = 20.0
) -> tuple[Latency, ...]:
    """Time two models turn about, an entry for every set of shapes; 0 threads is the runtime's own choice."""
    return tuple(
        measure.race(
            models,
            feed,
            provider=settings.provider,
            threads=threads,
            seed=settings.seed,
            seconds=seconds,
            folder=loaded.file.folder,
            streams=settings.streams if threads else 1,
        )[0]
        for feed in loaded.feeds
    )


def facts(file: ModelFile, loaded: Loaded, path: Path | None = None) -> ModelFacts:
    """Bytes, parameters and multiply-adds of a file, as it is on disk."""
    model, runs = loaded.opening.original if file is loaded.file else file.model, loaded.runs[0]
    if file is not loaded.file or loaded.merged:
        runs = profile(loaded.opening.of(model).flat, loaded.feeds[0], folder=file.folder)
    return ModelFacts(
        path=str(path or file.path),
        sha256=file.sha256,
        bytes=file.bytes,
        parameters=measure.parameters(model),
        macs=measure.multiply_adds(dict(runs)),
    )


def facts_of(staged: Path, loaded: Loaded, out: Path) -> ModelFacts:
    """Facts of a staged file under the name that it will have."""
    return facts(read_model(staged), loaded, out)
