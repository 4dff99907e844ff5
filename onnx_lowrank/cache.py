"""The cache of latency tables as a user handles it: list, clear, export, import."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx_lowrank.errors import SettingsError
from onnx_lowrank.latency import DENSE, environment, read_table, table_name, write_table


@dataclasses.dataclass(frozen=True)
class Entry:
    """One table: where it lies, what it was measured with, how many geometries and times it holds."""

    path: Path
    environment: dict[str, Any]
    geometries: int
    times: int
    here: bool


def entries(folder: Path, provider: str = "cpu", threads: int = 1) -> list[Entry]:
    """The tables of a cache folder; `here` marks the one that this machine uses with these settings."""
    found = []
    mine = table_name(environment(provider, threads))
    for path in sorted(folder.glob("latency-*.json")):
        try:
            settings, rows = read_table(path)
        except SettingsError:
            continue
        found.append(Entry(path, settings, len(rows), sum(map(len, rows.values())), path.name == mine))
    return found


def clear(folder: Path) -> int:
    """Delete the tables of a cache folder; how many there were."""
    paths = list(folder.glob("latency-*.json"))
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


def export(folder: Path, target: Path, provider: str = "cpu", threads: int = 1, precision: str = "") -> Entry:
    """Copy this machine's table to a file, to plan with it elsewhere (`--cache FILE`).

    Args:
        precision: of the table, as `cache ls` shows it; empty is the models' own.

    Raises:
        SettingsError: nothing was measured with these settings, or the file cannot be written.
    """
    source = folder / table_name(environment(provider, threads, precision))
    if not source.exists():
        made = f" in {precision}" if precision else ""
        raise SettingsError(
            f"{folder}: no table for provider {provider} with {threads} threads{made}; run analyze here first"
        )
    settings, rows = read_table(source)
    write_table(target, settings, rows)
    return Entry(target, settings, len(rows), sum(map(len, rows.values())), True)


def bring(folder: Path, source: Path) -> Entry:
    """Put an exported table into a cache folder, beside or into the one that is there.

    Known times stay. New ones of a fragment that is known are scaled by the dense weight's two times, as
    `LatencyTable.measure` does.

    Raises:
        SettingsError: not a table, or the folder cannot be written.
    """
    settings, rows = read_table(source)
    target = folder / table_name(settings)
    known = read_table(target)[1] if target.exists() else {}
    merged = {key: _merged(known.get(key, {}), rows.get(key, {})) for key in {*rows, *known}}
    write_table(target, settings, merged)
    return Entry(target, settings, len(merged), sum(map(len, merged.values())), False)


def _merged(known: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """One row out of two of the same fragment, or of what is no fragment and has no dense weight."""
    scale = known[DENSE] / other[DENSE] if DENSE in known and other.get(DENSE) else 1.0
    return {**{label: ms * scale for label, ms in other.items()}, **known}
