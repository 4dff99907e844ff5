"""What the NVIDIA card is and how it is doing: name, driver, clocks, temperature, power. Absent when there is none."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from typing import Any, Final

_FIELDS: Final = {
    "name": "name",
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watts": "power.draw",
    "watts_limit": "power.limit",
}
"""Keys of the facts, and what `nvidia-smi` calls them."""


def facts(device: int = 0) -> dict[str, Any]:
    """The card now; empty without one. Read by nvidia-ml-py (extra `gpu-info`), else by `nvidia-smi`."""
    return _by_library(device) or _by_command(device)


def identity(device: int = 0) -> dict[str, Any]:
    """What a table of latencies depends on: the card's name and its driver."""
    found = facts(device)
    return {key: found[key] for key in ("name", "driver") if key in found}


def _by_library(device: int) -> dict[str, Any]:
    try:
        import pynvml as nv
    except ImportError:
        return {}
    try:
        nv.nvmlInit()
    except nv.NVMLError:
        return {}
    found: dict[str, Any] = {}

    def note(key: str, read: Callable[[], Any]) -> None:
        with contextlib.suppress(nv.NVMLError, AttributeError):
            value = read()
            found[key] = value.decode() if isinstance(value, bytes) else value

    with contextlib.suppress(nv.NVMLError):
        card = nv.nvmlDeviceGetHandleByIndex(device)
        note("name", lambda: nv.nvmlDeviceGetName(card))
        note("driver", nv.nvmlSystemGetDriverVersion)
        note("sm_mhz", lambda: nv.nvmlDeviceGetClockInfo(card, nv.NVML_CLOCK_SM))
        note("sm_max_mhz", lambda: nv.nvmlDeviceGetMaxClockInfo(card, nv.NVML_CLOCK_SM))
        note("memory_mhz", lambda: nv.nvmlDeviceGetClockInfo(card, nv.NVML_CLOCK_MEM))
        note("celsius", lambda: nv.nvmlDeviceGetTemperature(card, nv.NVML_TEMPERATURE_GPU))
        note("watts", lambda: nv.nvmlDeviceGetPowerUsage(card) / 1000)
        note("watts_limit", lambda: nv.nvmlDeviceGetEnforcedPowerLimit(card) / 1000)
        note("throttled_by", lambda: nv.nvmlDeviceGetCurrentClocksThrottleReasons(card))
    with contextlib.suppress(nv.NVMLError):
        nv.nvmlShutdown()
    return found


def _by_command(device: int) -> dict[str, Any]:
    command = ["nvidia-smi", f"--id={device}", f"--query-gpu={','.join(_FIELDS.values())}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return parsed(done.stdout)


def parsed(line: str) -> dict[str, Any]:
    """The facts in one line of `nvidia-smi --format=csv`; what the card does not tell is left out."""
    found: dict[str, Any] = {}
    for key, text in zip(_FIELDS, line.strip().split(","), strict=False):
        value = text.strip()
        if not value or "N/A" in value or "Not Supported" in value:
            continue
        found[key] = value if key in ("name", "driver") else float(value)
    return found
