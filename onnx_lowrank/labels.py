"""Short names of files that stand side by side."""

from __future__ import annotations

from collections.abc import Sequence


def file_names(paths: Sequence[str]) -> list[str]:
    """The name of each file; its path where another file has that name; numbered where a path is repeated."""
    names = [path.replace("\\", "/").rpartition("/")[2] for path in paths]
    known: dict[str, set[str]] = {}
    for path, name in zip(paths, names, strict=True):
        known.setdefault(name, set()).add(path)
    found = []
    for index, (path, name) in enumerate(zip(paths, names, strict=True), 1):
        shown = name if len(known[name]) == 1 else path
        found.append(f"{shown} ({index})" if paths.count(path) > 1 else shown)
    return found
