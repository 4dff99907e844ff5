"""What a run that was killed has left behind: known by a lock that no living process holds, and removed.

Temporary files and folders are locked by the process that makes them. The system drops the lock when that process
ends, however it ends; so what can be locked is nobody's. Where the system has no such locks, nothing is removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

LOCK: Final = ".owner"
"""Name of the locked file in a temporary folder."""

_AGE: Final = 1.0  # seconds: a file is a moment old before its maker has locked it


def lock(handle: int) -> bool:
    """Lock an open file until it is closed; False where another process has it, or the system has no locks."""
    try:
        import fcntl  # not everywhere

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def own(folder: Path) -> int | None:
    """Mark a temporary folder as this process's; the handle keeps it so until it is closed."""
    try:
        handle = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:  # a full disk: then it is not removed either
        return None
    lock(handle)
    return handle


def disown(handle: int | None) -> None:
    """Let a folder go."""
    if handle is not None:
        os.close(handle)


def discard_folders(parent: Path, pattern: str, seen: Callable[[Path], object] | None = None) -> None:
    """Remove the temporary folders in `parent` whose process is gone; `seen` is called with each before."""
    for folder in _old(parent, pattern):
        if folder.is_dir() and not folder.is_symlink() and _is_free(folder / LOCK):
            if seen is not None:
                seen(folder)
            shutil.rmtree(folder, ignore_errors=True)


def discard_files(parent: Path, pattern: str) -> None:
    """Remove the temporary files in `parent` whose process is gone."""
    for file in _old(parent, pattern):
        if not file.is_symlink() and file.is_file() and _is_free(file):
            with contextlib.suppress(OSError):
                file.unlink()


def _old(parent: Path, pattern: str) -> list[Path]:
    found = []
    with contextlib.suppress(OSError):
        for path in parent.glob(pattern):
            if time.time() - path.lstat().st_ctime > _AGE:
                found.append(path)
    return found


def _is_free(file: Path) -> bool:
    try:
        handle = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return lock(handle)
    finally:
        os.close(handle)
