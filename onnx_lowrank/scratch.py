"""Temporary folders that go with their owner; what killed runs have left of them goes at the next start.

See `stale`: a folder whose process lives is locked, and never touched.
"""

from __future__ import annotations

import functools
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from onnx_lowrank.stale import discard_folders, disown, own

_PREFIX: Final = "onnx-lowrank-"


class Folder:
    """A temporary folder that goes with its owner, at `close` or at the end of the process."""

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        _discard_stale(parent)
        self.path = parent / f"{_PREFIX}{secrets.token_hex(8)}"
        handles: list[int | None] = []
        self.close = weakref.finalize(self, _remove, self.path, handles)  # an interrupt from here on leaves nothing
        self.path.mkdir(mode=0o700)
        handles.append(own(self.path))


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder for a while."""
    folder = Folder()
    try:
        yield folder.path
    finally:
        folder.close()


@functools.cache
def _discard_stale(parent: Path) -> None:
    """Once in a process."""
    discard_folders(parent, f"{_PREFIX}*")


def _remove(path: Path, handles: list[int | None]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    for handle in handles:
        disown(handle)
