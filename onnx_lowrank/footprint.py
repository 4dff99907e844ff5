"""Load time, first run and peak memory of a model, each in a child process that has done nothing before."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lowrank.errors import ModelError, RuntimeMissing
from onnx_lowrank.providers import Provider
from onnx_lowrank.runtime import Feed, Session, load
from onnx_lowrank.scratch import scratch

_MOST, _LIMIT = 3, 600.0


def cold(path: Path, feed: Feed, *, provider: str, threads: int, seconds: float) -> dict[str, Any]:
    """What a fresh process pays for a model: `load_ms`, `first_run_ms` (medians), `peak_bytes`, `base_bytes`.

    `base_bytes` is what the process takes before it loads the model: the interpreter and the runtime. Memory is null
    where the system does not tell it.

    Args:
        seconds: another process is begun for so long, up to three.

    Raises:
        ModelError: the child could not run the model.
    """
    found: list[dict[str, Any]] = []
    since = time.perf_counter()
    with scratch() as folder:
        inputs = Path(folder, "inputs.npz")
        np.savez(inputs, *(np.asarray(array) for array in feed.values()))
        task = {
            "model": str(path),
            "inputs": str(inputs),
            "names": list(feed),
            "provider": str(provider),
            "options": Provider.of(provider).options,
            "engines": str(Provider.of(provider).folder or ""),
            "threads": threads,
        }
        while not found or (len(found) < _MOST and time.perf_counter() - since < seconds):
            found.append(_child(task))
    times = {key: float(np.median([one[key] for one in found])) for key in ("load_ms", "first_run_ms")}
    peak = [one["peak_bytes"] for one in found if one["peak_bytes"] is not None]
    base = [one["base_bytes"] for one in found if one["base_bytes"] is not None]
    return {
        **times,
        "peak_bytes": int(np.median(peak)) if peak else None,
        "base_bytes": int(np.median(base)) if base else None,
        "processes": len(found),
    }


def _child(task: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "onnx_lowrank.footprint"]
    try:
        done = subprocess.run(
            command, input=json.dumps(task), capture_output=True, text=True, timeout=_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"{task['model']}: not loaded and run within {_LIMIT:.0f} s in a fresh process") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ModelError(f"{task['model']}: fails in a fresh process: {last[:300]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def peak_memory() -> int | None:
    """Largest resident bytes of this process so far; None where Linux does not tell.

    `ru_maxrss` would not do: a child inherits its parent's there.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _run(task: dict[str, Any]) -> dict[str, Any]:
    with np.load(task["inputs"], allow_pickle=True) as stored:  # the parent's own file; strings are objects
        feed = dict(zip(task["names"], (stored[name] for name in stored.files), strict=True))
    load()
    base, since = peak_memory(), time.perf_counter()
    engines = Path(task["engines"]) if task["engines"] else None
    provider = Provider(task["provider"], task["options"], folder=engines)
    session = Session(Path(task["model"]), provider=provider, threads=task["threads"], spin=True, purpose="verify")
    loaded = time.perf_counter()
    session.run(feed)
    first = time.perf_counter()
    for _ in range(2):
        session.run(feed)
    return {
        "load_ms": (loaded - since) * 1e3,
        "first_run_ms": (first - loaded) * 1e3,
        "peak_bytes": peak_memory(),
        "base_bytes": base,
    }


if __name__ == "__main__":
    try:
        print(json.dumps(_run(json.load(sys.stdin))))
    except (ModelError, RuntimeMissing) as fault:
        sys.exit(str(fault))
