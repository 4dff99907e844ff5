"""Throughput under concurrency: several threads that run one session at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from onnx_lowrank.linalg import Array

_WINDOWS, _SECONDS = 5, 0.2


def throughput(runs: Sequence[Callable[[], object]], streams: int, *, seed: int, seconds: float = _SECONDS) -> Array:
    """Runs a second of each of `runs` in `streams` threads at once, in some windows turn about: windows × runs.

    Raises:
        Exception: whatever a run raises.
    """
    rng = np.random.default_rng(seed)
    rates = np.zeros((_WINDOWS, len(runs)))
    for window in rates:
        for index in rng.permutation(len(runs)):
            window[index] = _rate(runs[index], streams, seconds)
    return rates


def _rate(run: Callable[[], object], streams: int, seconds: float) -> float:
    """Finished runs ÷ the time until the last thread was done; every thread makes at least one."""
    ready = threading.Barrier(streams + 1)
    counts, faults = [0] * streams, list[BaseException]()

    def work(index: int) -> None:
        ready.wait()
        end = time.perf_counter() + seconds
        try:
            while not counts[index] or time.perf_counter() < end:
                run()
                counts[index] += 1
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(streams)]
    for thread in threads:
        thread.start()
    ready.wait()
    since = time.perf_counter()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return sum(counts) / (time.perf_counter() - since)
