"""What a plan was estimated to give before it was built, and what came of it, in words; of the report's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnx_lowrank import figures


def estimates(report: Mapping[str, Any]) -> list[str]:
    """A sentence each on the time that the sites foretold, on what the profile corrected, and on bent losses."""
    return [*_times(report.get("additivity") or {}), *_losses(report.get("probes") or {})]


def _times(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    times = [float(found[f"{key}_ms"]) for key in ("before", "predicted", "measured")]
    before, predicted, measured = (figures.fixed(ms, figures.decimals(times)) for ms in times)
    apart = 100 * (times[1] / times[2] - 1)
    said = [
        f"The sum over the sites foretold {predicted} ms for the whole model, of {before} ms; built, it took "
        f"{measured} ms ({apart:+.0f} %)."
    ]
    if count := found.get("corrected_sites"):
        said.append(f"The runtime's profile had corrected the times of {count} site{'s' if count > 1 else ''}.")
    return said


def _losses(found: Mapping[str, Any]) -> list[str]:
    bent, checked = len(found.get("not_linear") or ()), found.get("checked")
    if not bent or not checked:
        return []
    return [f"At {bent} of {checked} sites that were probed twice the loss is no straight line in the site's error."]
