"""`optimize` as a user runs it, for the benchmarks of whole runs: its report, its seconds, its peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def optimized(model: Path, options: Sequence[str]) -> tuple[Report | None, dict[str, Any]]:
    """One run in a process of its own.

    Args:
        options: all that stands behind the model.

    Returns:
        The JSON report, None where the run failed; and seconds and peak megabytes, or the exit code and the last words.
    """
    command = [sys.executable, "-m", "onnx_lowrank", "optimize", str(model), *options]
    since = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        answer, errors = Path(scratch, "report.json"), Path(scratch, "errors")
        with answer.open("w") as stdout, errors.open("w") as stderr:
            child = subprocess.Popen([*command, "--json"], stdout=stdout, stderr=stderr)
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            return None, {"exit": child.returncode, "error": errors.read_text().strip()[-300:]}
        report: Report = json.loads(answer.read_text())
    seconds, peak = round(time.perf_counter() - since, 1), round(usage.ru_maxrss * 1024 / 1e6)
    return report, {"seconds": seconds, "stages": report["seconds"], "peak_megabytes": peak}


def split_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before `--`, and those after it."""
    cut = words.index("--") if "--" in words else len(words)
    return list(words[:cut]), list(words[cut + 1 :])
