"""What a plan was predicted to take, what it took when it was built, and what its losses stand on, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnx_lowrank import figures


def estimates(report: Mapping[str, Any]) -> list[str]:
    """A sentence each on the whole model's predicted and measured time, and on losses that are not linear."""
    return [*_times(report.get("additivity") or {}), *_losses(report.get("probes") or {})]


def _times(found: Mapping[str, Any]) -> list[str]:
    known = [found.get(f"{key}_ms") for key in ("before", "predicted", "measured")]
    times = [float(ms) for ms in known if figures.finite(ms)]
    if len(times) < len(known) or times[2] <= 0:
        return []
    before, predicted, measured = (figures.fixed(ms, figures.decimals(times)) for ms in times)
    off = 100 * (times[1] / times[2] - 1)
    return [
        f"Whole model: {before} ms before, {predicted} ms predicted from the times of its sites, {measured} ms "
        f"measured when built: the prediction is {abs(off):.1f} % too {'short' if off < 0 else 'long'}"
        f"{_corrected(found.get('corrected_sites'))}."
    ]


def _corrected(count: Any) -> str:
    if not figures.finite(count):
        return ""
    sites = f"the times of {count:.0f} site{'' if count == 1 else 's'}" if count else "no site's time"
    return f", and the runtime's profile corrected {sites}"


def _losses(found: Mapping[str, Any]) -> list[str]:
    bent = len(found.get("not_linear") or ())
    if not bent:
        return []
    checked = f" of the {found['checked']}" if found.get("checked") else ""
    probed = f"{bent}{checked} sites that were probed at two ranks or more"
    return [f"At {probed}, the loss is not linear in the site's error."]
