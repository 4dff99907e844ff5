from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Samples:
    cpu: object
    wall: object


@dataclass(frozen=True)
class Ratio:
    value: float
    low: float
    high: float


def interleave(runs, *, rounds, seconds, seed, warmup=2, min_rounds=5):
    rng = np.random.default_rng(seed)
    for _ in range(warmup):
        for r in runs:
            r()
    cpu = []
    wall = []
    t0 = time.perf_counter()
    while len(cpu) < rounds and (len(cpu) < min_rounds or time.perf_counter() - t0 < seconds):
        c = np.zeros(len(runs))
        w = np.zeros(len(runs))
        for i in rng.permutation(len(runs)):
            a = time.thread_time()
            b = time.perf_counter()
            runs[i]()
            c[i] = time.thread_time() - a
            w[i] = time.perf_counter() - b
        cpu.append(c)
        wall.append(w)
    return Samples(np.array(cpu), np.array(wall))


def paired_ratio(a, b, *, seed=0, resamples=2000):
    r = a / b
    rng = np.random.default_rng(seed)
    m = np.median(r[rng.integers(0, len(r), (resamples, len(r)))], axis=1)
    return Ratio(float(np.median(r)), float(np.percentile(m, 2.5)), float(np.percentile(m, 97.5)))


def summary(t):
    return {"runs": len(t), "p50_ms": float(np.median(t) * 1e3), "mean_ms": float(np.mean(t) * 1e3)}
