"""Write files whole or not at all: temporary name, fsync, replace, fsync of the folder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from onnx_lowrank.errors import SettingsError
from onnx_lowrank.stale import discard_files, lock

__all__ = ["Part", "check_room", "read_chunks", "write_bytes", "write_files"]

_PREFIX, _SUFFIX = ".onnx-lowrank-", ".tmp"


@dataclasses.dataclass(frozen=True)
class Part:
    """A file to write: its final path, its content in chunks, and how many bytes that will be."""

    target: Path
    chunks: Iterable[bytes]
    size: int


def read_chunks(file: Path) -> Iterator[bytes]:
    """The content of `file`, a few megabytes at a time."""
    with file.open("rb") as stream:
        while chunk := stream.read(8 << 20):
            yield chunk


def write_bytes(path: Path, content: bytes) -> None:
    """Write one file, whole or not at all; its folder is made where it is missing.

    Raises:
        SettingsError: as `write_files`, or the folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise SettingsError(f"cannot write '{path}': {fault.strerror}; choose another output") from fault
    write_files([Part(path, [content], len(content))])


def write_files(parts: Sequence[Part]) -> int:
    """Write all parts, then put them in their places in the given order; return the bytes written.

    Whatever goes wrong, an interrupt too, what was there before is still there and no temporary file is left.

    Raises:
        SettingsError: no room on the disk, or the system refuses to write.
    """
    out = parts[-1].target
    staged: list[tuple[Path, Path]] = []
    try:
        check_room(out, sum(part.size for part in parts))
        with contextlib.ExitStack() as locked:  # until all are written: what has no lock is taken for left behind
            for part in parts:
                if part.target.parent != out.parent:
                    part.target.parent.mkdir(parents=True, exist_ok=True)
                discard_files(part.target.parent, f"{_PREFIX}*{_SUFFIX}")
                staged.append((_temporary(part.target), part.target))
                _write(*staged[-1], part.chunks, locked)
        _replace(staged)
    except OSError as fault:
        why = fault.strerror or str(fault)
        raise SettingsError(f"cannot write '{out}': {why}; choose another output or make room there") from fault
    finally:
        for temporary, _ in staged:
            with contextlib.suppress(OSError):
                temporary.unlink()
    for folder in {target.parent for _, target in staged}:
        _sync_folder(folder)
    return sum(part.size for part in parts)


def check_room(out: Path, needed: int) -> None:
    """Refuse to write `needed` bytes where there is no room for them.

    Raises:
        SettingsError: too little of the disk is free.
    """
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise SettingsError(
            f"cannot write '{out}': it needs {needed / 1e6:.1f} MB and the disk has {free / 1e6:.1f} MB free; make room"
        )


def _temporary(target: Path) -> Path:
    return target.with_name(f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")


def _write(temporary: Path, target: Path, chunks: Iterable[bytes], locked: contextlib.ExitStack) -> None:
    file = locked.enter_context(temporary.open("xb"))
    lock(file.fileno())
    for chunk in chunks:
        file.write(chunk)
    file.flush()
    os.fsync(file.fileno())
    if target.is_file():
        shutil.copymode(target, temporary)


def _replace(staged: Sequence[tuple[Path, Path]]) -> None:
    """Replace all targets; when one fails, those before it get back what they were."""
    undo: list[tuple[Path | None, Path]] = []
    try:
        for temporary, target in staged:
            if len(staged) > 1:
                undo.append((_set_aside(target), target))
            temporary.replace(target)
    except BaseException:
        for (aside, target), (temporary, _) in zip(undo, staged, strict=False):
            if aside and not _is_still(aside, target):
                aside.replace(target)
            elif not aside and not temporary.exists():
                target.unlink(missing_ok=True)
        _discard(undo)
        raise
    _discard(undo)


def _set_aside(target: Path) -> Path | None:
    """A second name for what `target` is now; None when it is nothing yet."""
    if not os.path.lexists(target):
        return None
    aside = _temporary(target).with_suffix(".old")
    try:
        os.link(target, aside, follow_symlinks=False)
    except (OSError, NotImplementedError):  # no hard links on this file system
        target.rename(aside)
    return aside


def _is_still(aside: Path, target: Path) -> bool:
    return os.path.lexists(target) and os.path.samestat(aside.lstat(), target.lstat())


def _discard(undo: Sequence[tuple[Path | None, Path]]) -> None:
    for aside, _ in undo:
        if aside:
            with contextlib.suppress(OSError):
                aside.unlink()


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
