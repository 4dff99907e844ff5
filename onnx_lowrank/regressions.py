"""A comparison against an earlier one, read from its JSON: what became slower or less accurate, and by how much."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from onnx_lowrank import figures
from onnx_lowrank.errors import RequirementError, SettingsError
from onnx_lowrank.timings import Timing, Way, model_names, timings

Json = Mapping[str, Any]
DEFAULT: Final = 0.05
_LOSS_FLOOR: Final = 1e-7
"""Losses below this are noise of sums in another order."""

_BAD: Final = ("worse", "failed")


def read(path: Path) -> dict[str, Any]:
    """The JSON report of a comparison.

    Raises:
        SettingsError: it is missing or no such report.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        good = found["schema"] == 1 and all("path" in row for row in found["models"])
    except (OSError, ValueError, KeyError, TypeError) as fault:
        text = " ".join(str(fault).split())
        raise SettingsError(
            f"--baseline {path}: no comparison can be read there ({text}); give compare's .json"
        ) from None
    if not good:
        raise SettingsError(f"--baseline {path}: not a comparison of schema 1; give a report that compare wrote")
    return dict(found)


def change(now: Json, old: Json, *, against: str, limit: float) -> dict[str, Any]:
    """What changed since an earlier comparison, model by model (matched by name) and way of timing.

    Of a model that is not the baseline of the comparison the speed-up over that baseline is judged when both
    comparisons have the same baseline file, for its ratio is blind to how fast the machine was on the day; else the
    median is. A baseline that is the same file is shown and not judged: the machine or the runtime changed.

    A model that was compared or timed then and cannot be now has failed. Losses are judged on the same samples only.
    Whatever is not judged is a warning.
    """
    found = _Change(now, old, against, limit)
    found.models()
    found.latency()
    found.losses()
    if not any(row["judged"] in ("held", *_BAD) for row in found.rows):
        found.warnings.append(f"nothing was judged against {against}")
    here, there = now.get("environment") or {}, old.get("environment") or {}
    for key in ("processor", "runtime"):
        if here.get(key) != there.get(key):
            found.warnings.append(f"{against} was measured with another {key}: {there.get(key)}, now {here.get(key)}")
    return {"against": against, "max_regression": limit, "rows": found.rows, "warnings": found.warnings}


class _Change:
    """Two comparisons, and what is found between them."""

    def __init__(self, now: Json, old: Json, against: str, limit: float) -> None:
        self._now, self._old, self._against, self._limit = now, old, against, limit
        self._rows_now = dict(zip(model_names(now), now["models"], strict=True))
        self._rows_old = dict(zip(model_names(old), old["models"], strict=True))
        self._common = {
            name
            for name, row in self._rows_now.items()
            if name in self._rows_old and not (row.get("error") or self._rows_old[name].get("error"))
        }
        self.rows: list[dict[str, Any]] = []
        self.warnings: list[str] = []

    def models(self) -> None:
        """Models that are in one comparison only, and those that failed in one."""
        for name in self._rows_old:
            if name not in self._rows_now:
                why = "not among the models now"
                self.rows.append(_row(name, "", "model", judged="not compared", why=why))
                self.warnings.append(f"{name} is in {self._against}, but {why}: it was not compared")
        for name, row in self._rows_now.items():
            if name not in self._rows_old:
                self.warnings.append(f"{name} is not in {self._against}: it was not judged")
                continue
            failed_then = bool(self._rows_old[name].get("error"))
            if error := row.get("error"):
                self.rows.append(_row(name, "", "model", judged="not compared" if failed_then else "failed", why=error))
            elif failed_then:
                self.warnings.append(f"{name} could not be compared in {self._against}: it was not judged")

    def latency(self) -> None:
        """Medians and speed-ups of every way of timing that both have."""
        known, earlier = ({t.way: t for t in timings(report)} for report in (self._now, self._old))
        for way, timing in known.items():
            before = earlier.get(way)
            if before is None:
                self.warnings.append(f"{way.name}: not timed so in {self._against}, and not judged")
            else:
                self._medians(timing, before)
                self._timed_once(timing, before)
        refused = {Way.of(entry) for entry in self._now.get("untimed") or ()}
        for way, before in earlier.items():
            if way in known:
                continue
            if dataclasses.replace(way, clock="") in refused:
                for name in (n for n in before.names if n in self._common):
                    self._not_timed(name, way.name, before)
            else:
                self.warnings.append(f"{way.name}: timed so in {self._against}, and not now")

    def _medians(self, timing: Timing, before: Timing) -> None:
        first, there = (dict(r["models"][r.get("baseline") or 0]).get("sha256") for r in (self._now, self._old))
        same = first is not None and first == there
        stats = dict(zip(before.names, before.stats, strict=True))
        ratios, fresh = ({r.name: r.value for r in t.ratios} for t in (before, timing))
        for index, (name, found) in enumerate(zip(timing.names, timing.stats, strict=True)):
            by_ratio = same and name in ratios and name in fresh
            judged = not (by_ratio or (same and index == 0))
            was, now = stats.get(name, {}).get("p50_ms"), found.get("p50_ms")
            if figures.finite(was) and figures.finite(now) and was > 0:
                self._judge(name, timing.title, "p50 ms", was, now, now / was - 1, judged=judged)
            if by_ratio and fresh[name] > 0:
                worse = ratios[name] / fresh[name] - 1
                self._judge(name, timing.title, "speed-up", ratios[name], fresh[name], worse)

    def _timed_once(self, timing: Timing, before: Timing) -> None:
        """Models that one of the comparisons could not time in this way."""
        for name in dict.fromkeys((*timing.names, *before.names)):
            if name in self._common and name not in timing.names:
                self._not_timed(name, timing.title, before)
            elif name in self._common and name not in before.names:
                self.warnings.append(f"{name} was not timed with {timing.way.name} in {self._against}, and not judged")

    def _not_timed(self, name: str, title: str, before: Timing) -> None:
        was = dict(zip(before.names, before.stats, strict=True))[name].get("p50_ms")
        why = "could not be timed"
        self.rows.append(_row(name, title, "p50 ms", before=was, judged="failed", why=why))

    def losses(self) -> None:
        """Losses of models that both have; judged where they are of the same samples."""
        reason, count = self._incomparable(), len(self.rows)
        for name, row in self._rows_now.items():
            before = self._rows_old.get(name, {})
            was, now = before.get("loss"), row.get("loss")
            if name not in self._common or not figures.finite(was):
                continue
            part = len(row.get("sample_losses") or ()) != len(before.get("sample_losses") or ())
            worse = max(now, _LOSS_FLOOR) / max(was, _LOSS_FLOOR) - 1 if figures.finite(now) else math.inf
            self._judge(name, "", "loss", was, now, worse, judged=not (reason or part))
            if part and not reason:
                self.warnings.append(f"the loss of {name} is not judged: {self._against} has it on other samples")
        if reason and len(self.rows) > count:
            self.warnings.append(f"losses are not judged: {reason}")

    def _incomparable(self) -> str:
        """Why a loss of one comparison says nothing about one of the other; empty when they are of the same samples."""
        now, old = ({"metric": "relative", **r} for r in (self._now, self._old))
        for key in ("metric", "data"):
            if now.get(key) != old.get(key):
                return f"{self._against} has another {key}: {old.get(key)}, now {now.get(key)}"
        here, there = (r.get("sample_fingerprint") or {} for r in (now, old))
        first_then, first_now = (model_names(r)[r.get("baseline") or 0] for r in (old, now))
        if first_then != first_now:
            return f"{self._against} compares with {first_then}, now {first_now}"
        if not there.get("sha256"):
            return f"{self._against} does not tell which samples its losses are of"
        if here != there:
            counts = [figures.fixed(facts.get("count"), 0) for facts in (there, here)]
            return f"{self._against} has other samples ({counts[0]}, now {counts[1]})"
        return ""

    def _judge(
        self, model: str, title: str, what: str, before: float, now: Any, worse: float, *, judged: bool = True
    ) -> None:
        said = ("worse" if worse > self._limit else "held") if judged else "not judged"
        now = now if figures.finite(now) else None
        self.rows.append(_row(model, title, what, before=before, now=now, worse=worse, judged=said))


def _row(
    model: str, title: str, what: str, *, before: Any = None, now: Any = None, worse: float = math.inf,
    judged: str, why: Any = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model": model,
        "timed_with": title,
        "what": what,
        "before": before,
        "now": now,
        "worse_by": worse if math.isfinite(worse) else None,
        "judged": judged,
        "why": why,
    }


def bad(found: Json) -> list[Json]:
    """The rows of a change that make it fail."""
    return [row for row in found.get("rows") or () if row.get("judged") in _BAD]


def require(found: Json) -> None:
    """Fail when something got worse than it may, or could not be compared or timed any more.

    Raises:
        RequirementError: naming it.
    """
    rows = bad(found)
    if rows:
        by = f" by more than {100 * found['max_regression']:g} %" if any(r["judged"] == "worse" for r in rows) else ""
        ordered = sorted(rows, key=lambda r: r["judged"] != "worse")
        raise RequirementError(f"worse than {found['against']}{by}: {'; '.join(said(row) for row in ordered)}")


def said(row: Json, *, briefly: bool = False) -> str:
    """A row that makes a comparison fail, in words."""
    where = f" ({row['timed_with']})" if row["timed_with"] else ""
    if row["judged"] == "failed" and row["what"] == "model":
        return f"{row['model']} could not be compared" + ("" if briefly else f": {row['why']}")
    if row["judged"] == "failed":
        return f"{row['model']} could not be timed{where}"
    now = "not finite" if row["now"] is None else figures.short(row["now"], 4)
    return f"{row['what']} of {row['model']}{where} {figures.short(row['before'], 4)} → {now}"
