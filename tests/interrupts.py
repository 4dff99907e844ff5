"""Runs of the command line that get a signal at a known moment: where a run stands is seen, not told from the time."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_PATIENCE = 120.0  # seconds until a moment must have come
_IMPORT = re.compile(r"^import time: .*\n", re.MULTILINE)

Seen = Callable[[Path, str], bool]
"""Whether a moment has come, by the run's folder and what Python has said so far of its imports."""


def _imported(module: str) -> Seen:
    line = re.compile(rf"^import time: .*\| +{re.escape(module)}$", re.MULTILINE)
    return lambda folder, said: line.search(said) is not None  # noqa: ARG005


def _there(pattern: str) -> Seen:
    return lambda folder, said: any(folder.glob(pattern))  # noqa: ARG005


MOMENTS: Final[dict[str, Seen]] = {
    "click is imported": _imported("click"),
    "onnx is imported": _imported("onnx"),
    "the runtime is imported": _imported("onnxruntime"),
    "times are kept": _there("cache/latency-*.json"),
    "the file is staged": _there(".out.onnx.*.staging"),
}
"""In their order, from the first one that an interrupt must be caught at."""


def interrupted(folder: Path, moment: str, number: signal.Signals) -> tuple[int, str]:
    """Exit code and stderr of an `optimize` of `wide.onnx` that gets a signal at a moment."""
    command = [sys.executable, "-X", "importtime", "-m", "onnx_lowrank", "optimize", "wide.onnx", "-o", "out.onnx"]
    # Jobs that a shell starts in the background inherit an ignored SIGINT; these must not.
    with tempfile.NamedTemporaryFile("w") as said, subprocess.Popen(
        [*command, "-d", "wide.npz", "--cache", "cache"], cwd=folder, stdout=subprocess.DEVNULL, stderr=said,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:  # fmt: skip
        try:
            end = time.monotonic() + _PATIENCE
            while process.poll() is None and time.monotonic() < end:
                if MOMENTS[moment](folder, Path(said.name).read_text()):
                    break
                time.sleep(0.005)
            process.send_signal(number)
            process.wait(timeout=_PATIENCE)
        finally:
            process.kill()  # of no effect on one that has ended
        return process.returncode, _IMPORT.sub("", Path(said.name).read_text())
