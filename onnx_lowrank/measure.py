"""Whole models measured: paired latency, size, parameters, multiply-adds."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_lowrank import timing
from onnx_lowrank.linalg import Array
from onnx_lowrank.runtime import Feed, NodeRun, Session
from onnx_lowrank.timing import Ratio


@dataclasses.dataclass(frozen=True)
class Latency:
    """Paired timing of original and rewritten model; `ratio` above 1 is faster, `aa` is original against itself."""

    shape: dict[str, list[int]]
    clock: str
    threads: int
    before: dict[str, float | int]
    after: dict[str, float | int]
    ratio: Ratio
    aa: Ratio

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        return {
            "shape": self.shape,
            "clock": self.clock,
            "threads": self.threads,
            "before": self.before,
            "after": self.after,
            "runs": self.before["runs"],
            "ratio": self.ratio.value,
            "ratio_ci": [self.ratio.low, self.ratio.high],
            "aa_ratio_ci": [self.aa.low, self.aa.high],
        }


def race(
    models: Sequence[Path | onnx.ModelProto],
    feed: Feed,
    *,
    provider: str,
    threads: int,
    seed: int,
    seconds: float = 20.0,
    rounds: int = 60,
    folder: Path | None = None,
) -> list[Latency]:
    """Time models turn about against the first, with the first twice as an A/A control.

    One thread on CPU is timed by `thread_time` (seconds of the core, blind to other processes), else by wall time.
    Returns one entry for every model after the first.
    """
    where: dict[str, Any] = {"provider": provider, "threads": threads, "folder": folder}
    times, clock = raced(models, feed, **where, seed=seed, seconds=seconds, rounds=rounds)
    return latencies(times, clock, feed, threads=threads, seed=seed)


def raced(
    models: Sequence[Path | onnx.ModelProto],
    feed: Feed,
    *,
    provider: str,
    threads: int,
    seed: int,
    seconds: float = 20.0,
    rounds: int = 60,
    folder: Path | None = None,
) -> tuple[Array, str]:
    """Seconds of every round, the first model twice and then all others; and the clock they were taken by."""
    sessions = [Session(m, provider=provider, threads=threads, folder=folder) for m in (models[0], *models)]
    runs = [functools.partial(s.run, feed) for s in sessions]
    samples = timing.interleave(runs, rounds=rounds, seconds=seconds, seed=seed, warmup=2, min_rounds=9)
    return samples.of(provider, threads)


def latencies(times: Array, clock: str, feed: Feed, *, threads: int, seed: int) -> list[Latency]:
    """An entry for every model after the first, out of what `raced` gives."""
    aa = timing.paired_ratio(times[:, 0], times[:, 1], seed=seed)
    return [
        Latency(
            shape={name: list(array.shape) for name, array in feed.items()},
            clock=clock,
            threads=threads,
            before=timing.summary(times[:, 1]),
            after=timing.summary(times[:, column]),
            ratio=timing.paired_ratio(times[:, 1], times[:, column], seed=seed),
            aa=aa,
        )
        for column in range(2, times.shape[1])
    ]


def quick_race(
    original: Path | onnx.ModelProto,
    other: onnx.ModelProto,
    feeds: Sequence[Feed],
    *,
    provider: str,
    threads: int,
    seed: int,
    folder: Path,
    seconds: float = 4.0,
) -> dict[str, float]:
    """Median milliseconds `before` and `after` of two models, turn about; the mean over the feeds."""
    sessions = [Session(m, provider=provider, threads=threads, folder=folder) for m in (original, other)]
    found = []
    for feed in feeds:
        runs = [functools.partial(s.run, feed) for s in sessions]
        samples = timing.interleave(runs, rounds=40, seconds=seconds, seed=seed, warmup=1, min_rounds=5)
        times, _ = samples.of(provider, threads)
        found.append(np.median(times, axis=0) * 1e3)
    before, after = np.mean(found, axis=0)
    return {"before": float(before), "after": float(after)}


def no_change() -> Ratio:
    """The ratio of a model to itself."""
    return Ratio(1.0, 1.0, 1.0)


def parameters(model: onnx.ModelProto) -> int:
    """Number of constants of the main graph (initializers and Constant nodes): floats, and arrays of 8 bits."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
    tensors = list(model.graph.initializer)
    tensors += [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    bytes_ = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    counted = (t for t in tensors if t.data_type in floats or (t.data_type in bytes_ and len(t.dims) > 1))
    return sum(math.prod(t.dims) for t in counted)


def multiply_adds(runs: dict[int, NodeRun]) -> int:
    """Multiply-adds of the MatMul, Gemm and Conv nodes in a profiled run."""
    total = 0
    for run in runs.values():
        outputs = math.prod(run.output_shapes[0]) if run.output_shapes else 0
        if run.op == "Conv":
            total += outputs * math.prod(run.input_shapes[1][1:])
        elif run.op in ("MatMul", "MatMulInteger"):
            total += outputs * run.input_shapes[0][-1]
        elif run.op == "Gemm":
            total += outputs * math.prod(run.input_shapes[0]) // max(run.output_shapes[0][0], 1)
    return total
