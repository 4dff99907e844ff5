"""Whole models measured: paired latency, size, parameters, multiply-adds."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_lowrank import sessions, timing
from onnx_lowrank.binding import Bound
from onnx_lowrank.heft import is_heavy
from onnx_lowrank.linalg import Array
from onnx_lowrank.protos import subgraphs
from onnx_lowrank.providers import Provider
from onnx_lowrank.runtime import Feed, NodeRun, Session
from onnx_lowrank.streams import throughput
from onnx_lowrank.timing import Ratio

WARM_SECONDS = 0.5
"""A card is warmed up for so long before a timing."""

NOISE, SLOWDOWN = 0.025, 1.08
"""From where on a user is warned: half-width of the A/A interval; slowest over fastest time of a fixed computation."""


@dataclasses.dataclass(frozen=True)
class Latency:
    """Paired timing of original and rewritten model; `ratio` above 1 is faster, `aa` is original against itself.

    `before` and `after` hold the single runs too (`samples_ms`, and `wall_samples_ms` beside CPU times), `again` and
    `again_wall` those of the control; `groups` are the rounds
    of each group of sessions, `speed` how much slower the processor was after each than at its best. `transfers` are
    milliseconds to move inputs and outputs between host and card; they are in no other time.
    """

    shape: dict[str, list[int]]
    clock: str
    threads: int
    before: dict[str, Any]
    after: dict[str, Any]
    ratio: Ratio
    aa: Ratio
    provider: str = "cpu"
    groups: tuple[int, ...] = ()
    speed: tuple[float, ...] = ()
    again: tuple[float, ...] = ()
    again_wall: tuple[float, ...] = ()
    transfers: dict[str, float] = dataclasses.field(default_factory=dict)
    provider_options: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        return {
            "shape": self.shape,
            "provider": self.provider,
            "provider_options": self.provider_options,
            "clock": self.clock,
            "threads": self.threads,
            "before": self.before,
            "after": self.after,
            "runs": self.before["runs"],
            "ratio": self.ratio.value,
            "ratio_ci": [self.ratio.low, self.ratio.high],
            "aa_ratio": self.aa.value,
            "aa_ratio_ci": [self.aa.low, self.aa.high],
            "rounds_by_session": list(self.groups),
            "processor_slowdown": list(self.speed),
            "control_ms": list(self.again),
            **({"control_wall_ms": list(self.again_wall)} if self.again_wall else {}),
            **({"transfers": self.transfers} if self.transfers else {}),
        }


@dataclasses.dataclass(frozen=True)
class Opened:
    """A session that is ready to be timed: one run, and what it took to get there."""

    run: Callable[[], object]
    load_ms: float
    first_run_ms: float


def opened(model: Path | onnx.ModelProto, feed: Feed, *, provider: str, threads: int, folder: Path | None) -> Opened:
    """Load a model for timing and run it once on a feed: engines are built and algorithms looked for then."""
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
    folder: Path | None = None,
    streams: int = 1,
    short: float = sessions.SHORT,
) -> list[Latency]:
    """Time models turn about against the first, with the first twice as an A/A control.

    One thread on CPU is timed by `thread_time` (seconds of the core, blind to other processes), else by wall time.
    On a card inputs and outputs stay there and every run ends when the card is done. Every model is opened anew
    several times, so that the intervals hold what differs between sessions; where one is heavy, never two at a time.
    One entry for each model after the first.

    Args:
        streams: above 1, the throughput of so many threads at the same time is measured too, on a card with transfers.
        short: seconds in each group of sessions in which more rounds than needed are made, for the tails.
    """
    apart = any(map(is_heavy, models))
    entrants = [_opener(m, feed, provider, threads, folder) for m in (models[0], *models)]
    raced = sessions.race(entrants, seconds=seconds, seed=seed, short=short, apart=apart)
    times, clock = raced.of(provider, threads)
    control, first, wall = times[:, 0], times[:, 1], raced.samples.wall
    stats = [_stats(times[:, i], wall[:, i], clock) for i in range(1, len(entrants))]
    if streams > 1:
        plain = [functools.partial(_plain, m, feed, provider, threads, folder) for m in models]
        stats = [{**s, **rates} for s, rates in zip(stats, _throughput(plain, streams, seed, apart), strict=True)]
    same_for_all: dict[str, Any] = {
        "shape": {name: list(np.shape(array)) for name, array in feed.items()},
        "clock": clock,
        "threads": threads,
        "before": stats[0],
        "aa": sessions.ratio(control, first, raced.groups),
        "provider": str(provider),
        "provider_options": dict(Provider.of(provider).options),
        "groups": raced.groups,
        "speed": raced.speed,
        "again": _milliseconds(control),
        "again_wall": _milliseconds(wall[:, 0]) if clock != "wall" else (),
        "transfers": _transfers(entrants[0], provider),
    }
    ratios = [sessions.ratio(first, times[:, i], raced.groups, control) for i in range(2, len(entrants))]
    return [Latency(after=s, ratio=r, **same_for_all) for s, r in zip(stats[1:], ratios, strict=True)]


def _opener(
    model: Path | onnx.ModelProto, feed: Feed, provider: str, threads: int, folder: Path | None
) -> sessions.Opener:
    return lambda: opened(model, feed, provider=provider, threads=threads, folder=folder).run


def _plain(
    model: Path | onnx.ModelProto, feed: Feed, provider: str, threads: int, folder: Path | None
) -> Callable[[], object]:
    """A run that several threads may make at once: a bound one has its outputs in one place."""
    session = Session(model, provider=provider, threads=threads, folder=folder, spin=True, purpose="verify")
    return functools.partial(session.run, feed)


def _throughput(openers: Sequence[sessions.Opener], streams: int, seed: int, apart: bool) -> list[dict[str, Any]]:
    """What `_rates` gives for each model."""
    if apart:
        rates = np.hstack([throughput([opener()], streams, seed=seed) for opener in openers])
    else:
        rates = throughput([opener() for opener in openers], streams, seed=seed)
    return [_rates(streams, windows) for windows in rates.T]


def _transfers(opener: sessions.Opener, provider: str) -> dict[str, float]:
    """Milliseconds to move inputs and outputs; nothing where they are not bound."""
    run = opener() if Provider.of(provider).on_device else None
    return run.transfers() if isinstance(run, Bound) else {}


def _stats(times: Array, wall: Array, clock: str) -> dict[str, Any]:
    found: dict[str, Any] = timing.summary(times)
    raw: dict[str, Any] = {"samples_ms": list(_milliseconds(times))}
    if clock != "wall":
        raw["wall_samples_ms"] = list(_milliseconds(wall))
        found["wall_p50_ms"] = float(np.median(raw["wall_samples_ms"]))
    found["per_second"] = 1e3 / found["mean_ms"]
    return {**found, **raw}


def _rates(streams: int, windows: Array) -> dict[str, Any]:
    """Runs a second of several streams at once: the median of some windows, and each of them."""
    per_second = [round(float(rate), 3) for rate in windows]
    return {
        "streams": streams,
        "streams_per_second": float(np.median(per_second)),
        "streams_windows_per_second": per_second,
    }


def _milliseconds(times: Array) -> tuple[float, ...]:
    return tuple(round(float(t) * 1e3, 6) for t in times)


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
    """Median milliseconds `before` and `after` of two models, turn about; the mean over the feeds.

    Where one is heavy, they are open one at a time, each several times.
    """
    warm = WARM_SECONDS if Provider.of(provider).on_device else 0.0
    apart = is_heavy(original) or is_heavy(other)
    found = []
    for feed in feeds:
        openers = [_opener(m, feed, provider, threads, folder) for m in (original, other)]
        if apart:
            samples = sessions.race(openers, seconds=seconds, seed=seed, apart=True).samples
        else:
            runs = [opener() for opener in openers]
            samples = timing.interleave(
                runs, rounds=40, seconds=seconds, seed=seed, warmup=1, min_rounds=5, warm_seconds=warm
            )
        times, _ = samples.of(provider, threads)
        found.append(np.median(times, axis=0) * 1e3)
    before, after = np.mean(found, axis=0)
    return {"before": float(before), "after": float(after)}


def cautions(entries: Sequence[Latency]) -> list[str]:
    """Sentences about timings that one should not trust to the last percent: noise, a processor that slowed down."""
    found = []
    for entry in entries:
        threads = f"{entry.threads} thread{'s' if entry.threads > 1 else ''}" if entry.threads else "default threads"
        where = f"{entry.provider}, {threads}"
        noise = max(abs(entry.aa.low - 1), abs(entry.aa.high - 1))
        if noise > NOISE:
            found.append(
                f"noise above {100 * NOISE:g} % ({where}): the original against itself gave {entry.aa.low:.3f}–"
                f"{entry.aa.high:.3f}; differences of that size mean nothing, so time again on a quiet machine"
            )
        if entry.speed and max(entry.speed) > SLOWDOWN:
            found.append(
                f"the processor was slower at times (clock, or a busy neighbour; {where}): a fixed computation took "
                f"{100 * (max(entry.speed) - 1):.0f} % longer; single times are too high, ratios of the same round hold"
            )
    return list(dict.fromkeys(found))


def no_change() -> Ratio:
    """The ratio of a model to itself."""
    return Ratio(1.0, 1.0, 1.0)


def parameters(model: onnx.ModelProto) -> int:
    """Number of constants (initializers and Constant nodes, in bodies too): floats, and arrays of 8 bits."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
    tensors, graphs = [], [model.graph]
    while graphs:
        graph = graphs.pop()
        tensors += graph.initializer
        tensors += [a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
        graphs += [body for node in graph.node for body in subgraphs(node)]
    bytes_ = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    counted = (t for t in tensors if t.data_type in floats or (t.data_type in bytes_ and len(t.dims) > 1))
    return sum(math.prod(t.dims) for t in counted)


def multiply_adds(runs: dict[int, NodeRun]) -> int:
    """Multiply-adds of the MatMul, Gemm, Conv and ConvTranspose nodes in a profiled run."""
    total = 0
    for run in runs.values():
        outputs = math.prod(run.output_shapes[0]) if run.output_shapes else 0
        if run.op in ("Conv", "FusedConv"):
            total += outputs * math.prod(run.input_shapes[1][1:])
        elif run.op == "ConvTranspose":
            total += math.prod(run.input_shapes[0]) * math.prod(run.input_shapes[1][1:])
        elif run.op in ("MatMul", "MatMulInteger", "FusedMatMul"):
            total += outputs * run.input_shapes[0][-1]
        elif run.op in ("Gemm", "FusedGemm"):
            total += outputs * math.prod(run.input_shapes[0]) // max(run.output_shapes[0][0], 1)
    return total
