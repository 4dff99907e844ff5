"""Whole models measured: paired latency, size, parameters, multiply-adds."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_lowrank import timing
from onnx_lowrank.binding import Bound
from onnx_lowrank.providers import Provider
from onnx_lowrank.runtime import Feed, NodeRun, Session
from onnx_lowrank.timing import Ratio

WARM_SECONDS = 0.5
"""A card is warmed up for so long before a timing."""


@dataclasses.dataclass(frozen=True)
class Latency:
    """Paired timing of original and rewritten model; `ratio` above 1 is faster, `aa` is original against itself.

    `transfers` are milliseconds to move inputs and outputs between host and card; they are in no other time.
    """

    shape: dict[str, list[int]]
    clock: str
    threads: int
    before: dict[str, float | int]
    after: dict[str, float | int]
    ratio: Ratio
    aa: Ratio
    transfers: dict[str, float] = dataclasses.field(default_factory=dict)

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
            **({"transfers": self.transfers} if self.transfers else {}),
        }


@dataclasses.dataclass(frozen=True)
class Opened:
    """A session that is ready to be timed: one run, and what it took to get there."""

    run: Callable[[], object]
    load_ms: float
    first_run_ms: float

    def start(self) -> dict[str, float]:
        """Milliseconds of loading and of the first run, where engines are built and algorithms looked for."""
        return {"load_ms": self.load_ms, "first_run_ms": self.first_run_ms} if isinstance(self.run, Bound) else {}


def opened(model: Path | onnx.ModelProto, feed: Feed, *, provider: str, threads: int, folder: Path | None) -> Opened:
    """Load a model for timing and run it once on a feed."""
    since = time.perf_counter()
    session = Session(model, provider=provider, threads=threads, folder=folder, spin=True, purpose="time")
    loaded = time.perf_counter()
    run = session.timed(feed)
    run()
    return Opened(run, (loaded - since) * 1e3, (time.perf_counter() - loaded) * 1e3)


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
    On a card inputs and outputs stay there and every run ends when the card is done.
    Returns one entry for every model after the first.
    """
    ready = [opened(m, feed, provider=provider, threads=threads, folder=folder) for m in (models[0], *models)]
    runs = [one.run for one in ready]
    warm = WARM_SECONDS if Provider.of(provider).on_device else 0.0
    samples = timing.interleave(
        runs, rounds=rounds, seconds=seconds, seed=seed, warmup=2, min_rounds=9, warm_seconds=warm
    )
    times, clock = samples.of(provider, threads)
    aa = timing.paired_ratio(times[:, 0], times[:, 1], seed=seed)
    return [
        Latency(
            shape={name: list(array.shape) for name, array in feed.items()},
            clock=clock,
            threads=threads,
            before=timing.summary(times[:, 1]) | ready[1].start(),
            after=timing.summary(times[:, column]) | ready[column].start(),
            ratio=timing.paired_ratio(times[:, 1], times[:, column], seed=seed),
            aa=aa,
            transfers=runs[1].transfers() if isinstance(runs[1], Bound) else {},
        )
        for column in range(2, len(ready))
    ]


def quick_race(
    original: Path,
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
    captured = Provider.of(provider).captured  # a captured graph knows one shape: a session for each
    models = (original, other)
    warm = WARM_SECONDS if Provider.of(provider).on_device else 0.0
    sessions: list[Session] = []
    found = []
    for feed in feeds:
        if captured or not sessions:
            sessions = [
                Session(m, provider=provider, threads=threads, folder=folder, spin=True, purpose="time") for m in models
            ]
        runs = [s.timed(feed) for s in sessions]
        samples = timing.interleave(
            runs, rounds=40, seconds=seconds, seed=seed, warmup=1, min_rounds=5, warm_seconds=warm
        )
        times, _ = samples.of(provider, threads)
        found.append(np.median(times, axis=0) * 1e3)
    before, after = np.mean(found, axis=0)
    return {"before": float(before), "after": float(after)}


def no_change() -> Ratio:
    """The ratio of a model to itself."""
    return Ratio(1.0, 1.0, 1.0)


def parameters(model: onnx.ModelProto) -> int:
    """Number of floating point constants of the main graph (initializers and Constant nodes)."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
    tensors = list(model.graph.initializer)
    tensors += [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    return sum(math.prod(t.dims) for t in tensors if t.data_type in floats)


def multiply_adds(runs: dict[int, NodeRun]) -> int:
    """Multiply-adds of the MatMul, Gemm and Conv nodes in a profiled run."""
    total = 0
    for run in runs.values():
        outputs = math.prod(run.output_shapes[0]) if run.output_shapes else 0
        if run.op == "Conv":
            total += outputs * math.prod(run.input_shapes[1][1:])
        elif run.op == "MatMul":
            total += outputs * run.input_shapes[0][-1]
        elif run.op == "Gemm":
            total += outputs * math.prod(run.input_shapes[0]) // max(run.output_shapes[0][0], 1)
    return total
