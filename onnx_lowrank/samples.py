"""The raw samples of a report as CSV: one row for every timed run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from onnx_lowrank.timings import model_names

Json = Mapping[str, Any]
HEAD: Final = (
    "model",
    "provider",
    "threads",
    "shape",
    "clock",
    "session",
    "round",
    "milliseconds",
    "wall_milliseconds",
)


def csv_text(report: Json) -> str:
    """Every run: model, how it was timed, which group of sessions, which round, milliseconds, wall beside CPU time.

    The original's second session, the A/A control, is called `MODEL (control)`. Rounds pair the models.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(HEAD)
    for name, entry, times, wall in _series(report):
        shape = "; ".join(f"{n} {'x'.join(map(str, dims))}" for n, dims in (entry.get("shape") or {}).items())
        session = _sessions(entry.get("rounds_by_session") or [len(times)])
        for index, ms in enumerate(times):
            group = session[index] if index < len(session) else ""
            where = (name, entry.get("provider", ""), entry.get("threads"), shape, entry.get("clock"), group, index)
            writer.writerow((*where, ms, wall[index] if index < len(wall) else ""))
    return stream.getvalue()


def _sessions(groups: Sequence[int]) -> list[int]:
    return [index for index, count in enumerate(groups) for _ in range(count)]


Series = tuple[str, Json, Sequence[float], Sequence[float]]
"""Name, entry, milliseconds of every run, and those of the wall where the others are not."""


def _series(report: Json) -> Iterator[Series]:
    if "models" not in report:
        for entry in report.get("latency") or ():
            yield from _pair("original", "rewritten", entry, first=True)
        return
    names = model_names(report)
    first = names[report.get("baseline") or 0]
    ways = 1 + max((len(row.get("latencies") or ()) for row in report["models"]), default=0)
    for way in range(ways):
        seen = False
        for name, row in zip(names, report["models"], strict=True):
            more = row.get("latencies") or ()
            entry = row.get("latency") if way == 0 else more[way - 1] if way <= len(more) else None
            if entry:
                yield from _pair(first, name, entry, first=not seen)
                seen = True


def _pair(old: str, new: str, entry: Json, *, first: bool) -> Iterator[Series]:
    sides = [(old, entry["before"])] if first else []
    if first:
        yield f"{old} (control)", entry, entry.get("control_ms") or (), entry.get("control_wall_ms") or ()
    for name, side in (*sides, (new, entry["after"])):
        yield name, entry, side.get("samples_ms") or (), side.get("wall_samples_ms") or ()
