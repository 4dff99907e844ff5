"""The saved file, loaded and measured against the original: loss on held-out samples, paired latency."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnx_lowrank import measure
from onnx_lowrank.files import ModelFile, read_model
from onnx_lowrank.measure import Latency
from onnx_lowrank.prepare import Loaded
from onnx_lowrank.report import ModelFacts
from onnx_lowrank.runtime import Session, profile
from onnx_lowrank.settings import Settings
from onnx_lowrank.validation import References


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a file on disk is worth."""

    loss: float
    worst_sample: float
    latency: Latency


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A place beside OUT for a file of the same name; whatever is left there at the end is removed."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".staging", dir=out.parent))
    try:
        yield folder / out.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(staged: Path, out: Path) -> None:
    """Move a verified model to its place, its data file first; each step is atomic."""
    for path in sorted(staged.parent.iterdir(), key=lambda p: p.name == staged.name):
        path.replace(out.parent / path.name)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def measured(staged: Path, loaded: Loaded, references: References, settings: Settings) -> Measured:
    """Loss and latency of a saved file against the original file."""
    session = Session(staged, provider=settings.provider, threads=0)
    counted = references.loss(session)
    del session
    latency = race_files([loaded.file.path, staged], loaded, settings, settings.threads)[0]
    return Measured(counted.value(), max(counted.per_sample, default=0.0), latency)


def race_files(
    paths: list[Path], loaded: Loaded, settings: Settings, threads: int, seconds: float = 20.0
) -> list[Latency]:
    """Time files on disk turn about on the first sample; 0 threads is the runtime's own choice."""
    return measure.race(
        paths, loaded.first, provider=settings.provider, threads=threads, seed=settings.seed, seconds=seconds
    )


def facts(file: ModelFile, loaded: Loaded, path: Path | None = None) -> ModelFacts:
    """Bytes, parameters and multiply-adds of a file."""
    runs = loaded.runs if file is loaded.file else profile(file.model, loaded.first, folder=file.folder)
    return ModelFacts(
        path=str(path or file.path),
        sha256=file.sha256,
        bytes=file.bytes,
        parameters=measure.parameters(file.model),
        macs=measure.multiply_adds(dict(runs)),
    )


def facts_of(staged: Path, loaded: Loaded, out: Path) -> ModelFacts:
    """Facts of a staged file under the name that it will have."""
    return facts(read_model(staged), loaded, out)
