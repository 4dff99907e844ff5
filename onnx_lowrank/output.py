"""Reports and other side outputs on disk: format by suffix, refused before the work, written whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from onnx_lowrank import html
from onnx_lowrank.errors import ModelError, SettingsError
from onnx_lowrank.files import data_of, same
from onnx_lowrank.markdown import markdown
from onnx_lowrank.samples import csv_text
from onnx_lowrank.saving import check_place, write_bytes

_FORMATS: Final[dict[str, Callable[[Mapping[str, Any]], str]]] = {
    ".html": html.html,
    ".json": lambda report: json.dumps(report, indent=1) + "\n",
    ".md": markdown,
    ".csv": csv_text,
}


def check(written: Mapping[str, Path | None], models: Sequence[Path] = (), inputs: Iterable[str | Path] = ()) -> None:
    """Refuse, before the work, what could not be written after it, or would be written over something that is needed.

    Args:
        written: everything that will be written, by option; the result (`--output`) and `--keep-fp32` have further
            checks of their own.
        models: the models that are read.
        inputs: what else is read; as on the command line, with `input:` before a path or not.

    Raises:
        SettingsError: an unknown suffix, no place for a file, or two of all these are one file.
        RuntimeMissing: a library that the format needs is not installed.
    """
    report_to = written.get("--report")
    if report_to is not None:
        if report_to.suffix not in _FORMATS:
            names = ", ".join(_FORMATS)
            raise SettingsError(f"--report {report_to}: reports are written as {names}; give a name that ends so")
        if report_to.suffix == ".html":
            html.check()
    paths = {option: path for option, path in written.items() if path is not None}
    for option, path in paths.items():
        if option not in ("--output", "--keep-fp32"):
            _writable(path)
    _apart(paths, models, list(inputs))


def _apart(paths: Mapping[str, Path], models: Sequence[Path], inputs: Sequence[str | Path]) -> None:
    """Refuse outputs that are one file, or one that is read too. OUT may be MODEL: see `check_output`."""
    for (option, path), (other, taken) in itertools.combinations(paths.items(), 2):
        if same(path, taken):
            raise SettingsError(f"{option} and {other} are both '{path}'; choose another name for one")
    read = [Path(text) for text in inputs] + [Path(str(text).partition(":")[2] or text) for text in inputs]
    if any(os.path.lexists(path) for path in paths.values()):
        read += [file for model in models for file in _weights(model)]
    for option, path in paths.items():
        for file in (*read, *(models if option != "--output" else ())):
            if same(path, file):
                raise SettingsError(f"{option} '{path}' is a file that this run reads; choose another name")


def _weights(model: Path) -> list[Path]:
    try:
        return list(data_of(model).values())
    except ModelError:  # reading the model says why
        return []


def _writable(path: Path) -> None:
    try:
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise SettingsError(f"{path}: cannot be written there; give a file in a folder that exists")
        if os.path.lexists(path) and not path.is_symlink() and not path.is_file():
            raise SettingsError(f"{path}: is a device or a pipe; name a regular file")
        check_place(path.absolute())
    except OSError as fault:
        raise SettingsError(f"{path}: cannot be written there ({fault.strerror}); choose another place") from None


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the JSON form of a report as what the suffix says: HTML, JSON, Markdown, or raw samples as CSV."""
    write_text(path, _FORMATS[path.suffix](report))


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        SettingsError: it cannot be written.
    """
    write_bytes(path.absolute(), text.encode())
