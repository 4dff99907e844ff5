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

__all__ = ["Part", "check_place", "check_room", "put", "read_chunks", "write_bytes", "write_files"]

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
    """Write all parts, then put them in their places as `put` does; return the bytes written.

    Whatever goes wrong, an interrupt too, what was there before is still there and no temporary file is left.

    Raises:
        SettingsError: no room on the disk, or the system refuses to write.
    """
    out = parts[-1].target
    staged: list[tuple[Path, Path]] = []
    try:
        check_room(out, sum(part.size for part in parts))
        with contextlib.ExitStack() as locked:  # until all are in place: what has no lock is taken for left behind
            for part in parts:
                if part.target.parent != out.parent:
                    part.target.parent.mkdir(parents=True, exist_ok=True)
                discard_files(part.target.parent, f"{_PREFIX}*{_SUFFIX}")
                staged.append((_temporary(part.target), part.target))
                _write(*staged[-1], part.chunks, locked)
            put(staged)
    except OSError as fault:
        why = fault.strerror or str(fault)
        raise SettingsError(f"cannot write '{out}': {why}; choose another output or make room there") from fault
    finally:
        for temporary, _ in staged:
            with contextlib.suppress(OSError):
                temporary.unlink()
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


def put(staged: Sequence[tuple[Path, Path]]) -> None:
    """Move files to their places, in the given order: the last one, which refers to the others, makes them count.

    None of the others may replace anything but the same content. When something fails before the last one is there,
    those that were new are removed again.
    """
    *others, last = staged
    fresh = [(temporary, target) for temporary, target in others if not os.path.lexists(target)]
    try:
        for temporary, target in others:
            temporary.replace(target)
        for folder in {target.parent for _, target in others}:
            _sync_folder(folder)
        last[0].replace(last[1])
    except BaseException:
        if last[0].exists():
            for temporary, target in fresh:
                if not temporary.exists():
                    with contextlib.suppress(OSError):
                        target.unlink()
        raise
    _sync_folder(last[1].parent)


def check_place(path: Path) -> None:
    """Refuse a path that no file can be written to, by making one of another name beside it.

    Raises:
        OSError: what the system says.
    """
    with contextlib.suppress(FileNotFoundError):
        path.lstat()  # a name that is too long
    temporary = _temporary(path)
    try:
        temporary.touch(exist_ok=False)
    finally:
        temporary.unlink(missing_ok=True)


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


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
