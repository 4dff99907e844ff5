"""A comparison against an earlier one, read from its JSON: what became slower or less accurate, and by how much."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from onnx_lowrank import figures
from onnx_lowrank.errors import RequirementError, SettingsError
from onnx_lowrank.timings import Timing, model_names, timings

Json = Mapping[str, Any]
DEFAULT: Final = 0.05
_LOSS_FLOOR: Final = 1e-7
"""Losses below this are noise of sums in another order."""


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
    """
    same = _first(now).get("sha256") is not None and _first(now).get("sha256") == _first(old).get("sha256")
    rows = [*_latency(now, old, same, limit), *_losses(now, old, limit)]
    warnings = [] if rows else [f"{against} has none of these models timed in the same way"]
    here, there = now.get("environment") or {}, old.get("environment") or {}
    for key in ("processor", "runtime"):
        if here.get(key) != there.get(key):
            warnings.append(f"{against} was measured with another {key}: {there.get(key)}, now {here.get(key)}")
    return {"against": against, "max_regression": limit, "rows": rows, "warnings": warnings}


def _first(report: Json) -> Json:
    return dict(report["models"][report.get("baseline") or 0])


def _latency(now: Json, old: Json, same: bool, limit: float) -> Iterator[dict[str, Any]]:
    earlier = {_way(t): t for t in timings(old)}
    for timing in timings(now):
        before = earlier.get(_way(timing))
        if before is None:
            continue
        stats = dict(zip(before.names, before.stats, strict=True))
        ratios = {r.name: r.value for r in before.ratios}
        fresh = {r.name: r.value for r in timing.ratios}
        for index, (name, found) in enumerate(zip(timing.names, timing.stats, strict=True)):
            by_ratio = same and name in ratios and name in fresh
            judged = "" if by_ratio or (same and index == 0) else "judged"
            was, is_now = stats.get(name, {}).get("p50_ms"), found.get("p50_ms")
            if figures.finite(was) and figures.finite(is_now) and was > 0:
                yield _row(name, timing.title, "p50 ms", was, is_now, is_now / was - 1, judged, limit)
            if by_ratio and fresh[name] > 0:
                worse = ratios[name] / fresh[name] - 1
                yield _row(name, timing.title, "speed-up", ratios[name], fresh[name], worse, "judged", limit)


def _way(timing: Timing) -> tuple[str, str]:
    return timing.title, timing.inputs


def _losses(now: Json, old: Json, limit: float) -> Iterator[dict[str, Any]]:
    if now.get("metric", "relative") != old.get("metric", "relative") or now.get("data") != old.get("data"):
        return
    before = dict(zip(model_names(old), old["models"], strict=True))
    for name, row in zip(model_names(now), now["models"], strict=True):
        was, is_now = before.get(name, {}).get("loss"), row.get("loss")
        if figures.finite(was) and not figures.finite(is_now) and name in before:
            yield _row(name, "", "loss", was, None, math.inf, "judged", limit)
        elif figures.finite(was) and figures.finite(is_now):
            worse = max(is_now, _LOSS_FLOOR) / max(was, _LOSS_FLOOR) - 1
            yield _row(name, "", "loss", was, is_now, worse, "judged", limit)


def _row(
    model: str, title: str, what: str, before: float, now: float | None, worse: float, judged: str, limit: float
) -> dict[str, Any]:
    failed = bool(judged) and worse > limit
    return {
        "model": model,
        "timed_with": title,
        "what": what,
        "before": before,
        "now": now,
        "worse_by": worse if math.isfinite(worse) else None,
        "judged": "worse" if failed else "held" if judged else "not judged",
    }


def require(found: Json) -> None:
    """Fail when something got worse than it may.

    Raises:
        RequirementError: naming it.
    """
    worse = [row for row in found["rows"] if row["judged"] == "worse"]
    if worse:
        text = "; ".join(_said(row) for row in worse)
        raise RequirementError(
            f"worse than {found['against']} by more than {100 * found['max_regression']:g} %: {text}"
        )


def _said(row: Json) -> str:
    where = f" ({row['timed_with']})" if row["timed_with"] else ""
    now = "not finite" if row["now"] is None else figures.short(row["now"], 4)
    return f"{row['what']} of {row['model']}{where} {figures.short(row['before'], 4)} → {now}"
