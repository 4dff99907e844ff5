"""Timing that holds up on a shared machine: turn about in random order, paired ratios, percentiles.

Intervals of whole models are Student's t over groups of sessions (sessions.py, docs/decisions/030); the bootstrap over
rounds here is for what has one group only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lowrank.linalg import Array

_P90_RUNS, _P99_RUNS = 64, 662
"""Fewest runs from which a 90th and a 99th percentile can be told (a 95 % interval that ends inside the sample)."""


@dataclass(frozen=True)
class Samples:
    """Seconds of every run, rounds × runs: `cpu` by `thread_time` (this thread only), `wall` by `perf_counter`."""

    cpu: Array
    wall: Array

    def of(self, provider: str, threads: int) -> tuple[Array, str]:
        """The times to trust, and their clock: `thread` (blind to other processes) for one CPU thread, else `wall`."""
        return (self.cpu, "thread") if provider == "cpu" and threads == 1 else (self.wall, "wall")


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % interval."""

    value: float
    low: float
    high: float


def interleave(
    runs: Sequence[Callable[[], object]],
    *,
    rounds: int,
    seconds: float,
    seed: int,
    warmup: int = 2,
    min_rounds: int = 5,
    warm_seconds: float = 0.0,
) -> Samples:
    """Time each of `runs` once a round, in a new random order every round.

    Stops after `rounds`, or when `seconds` of wall time are gone and `min_rounds` were made. Before that, `warmup`
    rounds and as many as `warm_seconds` hold are not timed: a card raises its clocks and looks for algorithms then.
    """
    rng = np.random.default_rng(seed)
    warm = time.perf_counter() + warm_seconds
    while warmup > 0 or time.perf_counter() < warm:
        warmup -= 1
        for run in runs:
            run()
    cpu: list[Array] = []
    wall: list[Array] = []
    end = time.perf_counter() + seconds
    while len(cpu) < rounds and (len(cpu) < min_rounds or time.perf_counter() < end):
        one = one_round(runs, rng)
        cpu.append(one.cpu)
        wall.append(one.wall)
    return Samples(np.array(cpu), np.array(wall))


def one_round(runs: Sequence[Callable[[], object]], rng: np.random.Generator) -> Samples:
    """Each of `runs` once, in a random order; seconds, one entry a run."""
    cpu, wall = np.zeros(len(runs)), np.zeros(len(runs))
    for index in rng.permutation(len(runs)):
        since_cpu, since_wall = time.thread_time(), time.perf_counter()
        runs[index]()
        cpu[index] = time.thread_time() - since_cpu
        wall[index] = time.perf_counter() - since_wall
    return Samples(cpu, wall)


def warm_up(runs: Sequence[Callable[[], object]], *, seconds: float, most: int = 30) -> int:
    """Run turn about until no run beats its own best by more than 5 %, so at least twice.

    Returns the rounds made. Stops after `most`, or after any when `seconds` of wall time are gone.
    """
    best = np.full(len(runs), np.inf)
    end = time.perf_counter() + seconds
    for done in range(1, most + 1):
        now = np.zeros(len(runs))
        for index, run in enumerate(runs):
            since = time.perf_counter()
            run()
            now[index] = time.perf_counter() - since
        stable = done > 1 and bool(np.all(now > 0.95 * best))
        best = np.minimum(best, now)
        if stable or time.perf_counter() > end:
            return done
    return most


def paired_ratio(a: Array, b: Array, *, seed: int = 0, resamples: int = 2000) -> Ratio:
    """Median of the ratios `a/b` of the same round, with a 95 % bootstrap percentile interval.

    `a` and `b` are seconds, one entry a round.
    """
    ratios = a / b
    rng = np.random.default_rng(seed)
    medians = np.median(ratios[rng.integers(0, len(ratios), (resamples, len(ratios)))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def summary(times: Array) -> dict[str, float | int]:
    """Runs, p50 and mean in milliseconds; p90 and p99 only where the number of runs supports them."""
    ms = times * 1e3
    found: dict[str, float | int] = {"runs": len(ms), "p50_ms": float(np.median(ms)), "mean_ms": float(ms.mean())}
    for percent, fewest in ((90, _P90_RUNS), (99, _P99_RUNS)):
        if len(ms) >= fewest:
            found[f"p{percent}_ms"] = float(np.percentile(ms, percent))
    return found
