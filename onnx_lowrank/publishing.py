"""The way of a finished model to its place: a checked output, a folder beside it, one rename, the old data removed.

The name of a data file has a hash of its content, so that new data never replaces what the previous OUT reads: the
rename of the model is the one moment at which OUT changes.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from onnx_lowrank.errors import SettingsError
from onnx_lowrank.files import same
from onnx_lowrank.saving import check_place, put
from onnx_lowrank.stale import LOCK, discard_folders, disown, own

_NOTE: Final = ".replaced"
"""A file in a staging folder: names of the data files that may be nobody's when the process is killed."""


def check_output(out: Path, model: Path, *, in_place: bool) -> None:
    """Refuse an output path that cannot be written, or that would replace the input unasked.

    Raises:
        SettingsError: `out` is no place for a file, or is `model` itself and `in_place` is not set.
    """
    if out.is_dir():
        raise SettingsError(f"output '{out}' is a folder; name a file in it")
    if os.path.lexists(out) and not out.is_symlink() and not out.is_file():
        raise SettingsError(f"output '{out}' is a device or a pipe; name a regular file")
    folder = out.parent
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise SettingsError(f"the folder '{folder}' of output '{out.name}' {what}; create it or choose another output")
    if not in_place and same(out, model):
        raise SettingsError(f"output '{out}' is the input model; choose another name or add --in-place to replace it")
    try:
        check_place(_beside(out))
    except OSError as fault:
        why = f"is not writable ({fault.strerror})"
        raise SettingsError(f"the folder '{folder}' of output '{out.name}' {why}; choose another output") from None


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A place beside OUT for a file of the same name; whatever is left there at the end is removed.

    So is what killed runs for the same OUT have left.
    """
    left: set[str] = set()
    discard_folders(out.parent, f".{glob.escape(out.name)}.*.staging", lambda folder: left.update(_noted(folder)))
    _discard(out, left, ())
    folder, owner = _beside(out), None
    try:  # the name is known before the folder is there: an interrupt between the two leaves nothing
        folder.mkdir(mode=0o700)
        owner = own(folder)
        yield folder / out.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        disown(owner)


def publish(staged: Path, out: Path, source: Path) -> None:
    """Move a verified model to its place, its data file first: nothing is seen of it before the model is there.

    Args:
        source: the original, whose data is kept.

    Raises:
        SettingsError: the system refuses; the previous OUT is as it was.
    """
    made = [path for path in staged.parent.iterdir() if path.name not in (LOCK, _NOTE)]
    pairs = [(path, out.parent / path.name) for path in sorted(made, key=lambda p: p.name == staged.name)]
    with replacing(staged, out, source):
        try:
            put(pairs)
        except OSError as fault:
            why = fault.strerror or str(fault)
            raise SettingsError(f"cannot write '{out}': {why}; choose another output") from fault


@contextmanager
def replacing(staged: Path, out: Path, source: Path) -> Iterator[None]:
    """While OUT is replaced: its own data files that no model reads at the end are removed."""
    before = {name for name in _own(out, out.parent) if _reads(out, name)}
    new = _own(out, staged.parent)
    _note(staged.parent, before | new)
    try:
        yield
    finally:
        _discard(out, before | new, (source,))


def _beside(out: Path) -> Path:
    return out.parent / f".{out.name}.{secrets.token_hex(8)}.staging"


def _own(out: Path, folder: Path) -> set[str]:
    """Files in a folder that have a name as data of OUT has; without a hash other exporters and earlier versions do."""
    form = re.compile(re.escape(out.name) + r"(\.[0-9a-f]{8})?\.data")
    return {path.name for path in folder.iterdir() if form.fullmatch(path.name)}


def _note(folder: Path, names: Collection[str]) -> None:
    with contextlib.suppress(OSError):  # a full disk: then they stay where the process is killed
        (folder / _NOTE).write_text(json.dumps(sorted(names)))


def _noted(folder: Path) -> list[str]:
    try:
        names = json.loads((folder / _NOTE).read_text())
    except (OSError, ValueError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _discard(out: Path, names: Collection[str], sources: Collection[Path]) -> None:
    """Remove the data files among `names` that are of OUT's form and that no model in the folder, or source, reads."""
    left = _own(out, out.parent).intersection(names) if names else set()
    if not left:
        return
    others = [path for path in out.parent.iterdir() if path != out and path.name not in left]
    for model in (out, *sources, *others):
        left = {name for name in left if not _needs(model, out.parent / name)} if left and _is_model(model) else left
    for name in left:
        with contextlib.suppress(OSError):
            (out.parent / name).unlink()


def _needs(model: Path, data: Path) -> bool:
    """Whether a model may read this very data file, which one of its name in another folder is not."""
    return same(model.parent / data.name, data) and _reads(model, data.name)


def _is_model(path: Path) -> bool:
    """Whether a file may be a model, by its name or its first field."""
    try:
        if not path.is_file():
            return False
        if path.suffix == ".onnx":
            return True
        with path.open("rb") as stream:
            return stream.read(1) == b"\x08"
    except OSError:
        return True


def _reads(model: Path, name: str) -> bool:
    """Whether a model may read a data file: whether its bytes hold the name, or cannot be read."""
    sought, tail = os.fsencode(name), b""
    try:
        with model.open("rb") as stream:
            while chunk := stream.read(8 << 20):
                if sought in tail + chunk:
                    return True
                tail = chunk[-len(sought) :]
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
