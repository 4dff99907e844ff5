"""Reports and other side outputs on disk: format by suffix, refused before the work, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from onnx_lowrank import html
from onnx_lowrank.errors import SettingsError
from onnx_lowrank.markdown import markdown
from onnx_lowrank.samples import csv_text
from onnx_lowrank.saving import write_bytes

_FORMATS: Final[dict[str, Callable[[Mapping[str, Any]], str]]] = {
    ".html": html.html,
    ".json": lambda report: json.dumps(report, indent=1) + "\n",
    ".md": markdown,
    ".csv": csv_text,
}


def check(plan_out: Path | None, report_to: Path | None) -> None:
    """Refuse, before the work, what could not be written after it.

    Raises:
        SettingsError: an unknown suffix, or no such folder.
        RuntimeMissing: a library that the format needs is not installed.
    """
    if report_to is not None:
        if report_to.suffix not in _FORMATS:
            names = ", ".join(_FORMATS)
            raise SettingsError(f"--report {report_to}: reports are written as {names}; give a name that ends so")
        if report_to.suffix == ".html":
            html.check()
    for path in (plan_out, report_to):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise SettingsError(f"{path}: cannot be written there; give a file in a folder that exists")


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the JSON form of a report as what the suffix says: HTML, JSON, Markdown, or raw samples as CSV."""
    write_text(path, _FORMATS[path.suffix](report))


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        SettingsError: it cannot be written.
    """
    write_bytes(path.absolute(), text.encode())
