"""Which way to a precision: every way is built from the original, measured, and the fastest that holds is taken."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx

from onnx_lowrank import measure, timing
from onnx_lowrank.errors import ModelError, SettingsError
from onnx_lowrank.latency import read_table
from onnx_lowrank.normal import normal
from onnx_lowrank.precision import Lowering, Statistics
from onnx_lowrank.prepare import Loaded
from onnx_lowrank.quantization import LINEAR, OPSET
from onnx_lowrank.ranges import by_channel, extremes, histograms
from onnx_lowrank.runtime import Session
from onnx_lowrank.scheme import Scheme
from onnx_lowrank.settings import Settings
from onnx_lowrank.validation import References

Progress = Callable[[int, int], None]

_SAMPLES, _FEW = 24, 8  # calibration samples for the original's ranges, and for those of what is added
_MACS = 1.5e12  # multiply-adds that the passes for ranges may take, where that leaves 8 samples
_CLEARLY = 1.03  # times faster than linear operators alone: what all operators in 8 bits must be
_MOST_BYTES = 2**31 - 2**24  # of one protobuf message, less room for the graph
_SHARE = 0.5  # of the loss limit: int8 alone may take so much before nodes are left in float
_QUANTIZED = (
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv"),
    *("QLinearMatMul", "MatMulNBits", "QGemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QAttention"),
)


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to int8, measured: loss of the original made so, and its median milliseconds."""

    scheme: Scheme
    loss: float
    ms: float


def check_precision(model: onnx.ModelProto, precision: str | None, dtypes: set[str], size: int = 0) -> str | None:
    """The precision that has to be made; None where the model is left in its own.

    Args:
        dtypes: of the weights of the linear nodes.
        size: of the model's files, in bytes.

    Raises:
        SettingsError: the model's weights have already left float32, or are too large for one message.
    """
    if precision is None:
        return None
    found = next((node.op_type for node in model.graph.node if node.op_type in _QUANTIZED), None)
    if found is not None:
        raise SettingsError(
            f"--precision {precision}: the model is quantised already ({found}); give the float32 model it was made "
            "from, or leave --precision out"
        )
    if not dtypes - {"float32"}:
        if precision != "fp32" and size > _MOST_BYTES:
            raise SettingsError(
                f"--precision {precision}: the model has {size / 1e9:.1f} GB, and converters take 2 GB; "
                "leave --precision out"
            )
        return None if precision == "fp32" else precision
    if dtypes == {"float16"} and precision == "fp16":
        return None
    have = ", ".join(sorted(dtypes))
    raise SettingsError(
        f"--precision {precision}: the model's weights are {have}; give the float32 model it was made from, or leave "
        "--precision out"
    )


def choose_lowering(
    loaded: Loaded,
    settings: Settings,
    references: References,
    precision: str | None,
    progress: Progress,
    scheme: Scheme | None,
) -> tuple[Lowering | None, tuple[Way, ...]]:
    """How the model is brought to a precision, None where it stays in its own, and the ways that were measured for it.

    Args:
        scheme: of a plan that is replayed: nothing is measured, ranges are.
    """
    folder, provider = loaded.file.folder, settings.provider
    if precision is None:
        return None, ()
    if precision == "fp16":
        return Lowering(Scheme("fp16"), folder, provider), ()
    few = tuple(itertools.islice(loaded.calibration, _FEW))
    statistics = _statistics(loaded, settings)
    start = Lowering(scheme or Scheme("int8"), folder, provider, few, statistics)
    if scheme is not None:
        return start, ()
    ways = list(_ways(start, loaded, settings, references, progress))
    chosen = _best(ways, settings)
    if chosen.loss > _allowed(settings):
        chosen = _in_float(start, chosen, loaded, settings, references, progress)
        ways.append(chosen)
    return start.using(**dataclasses.asdict(chosen.scheme)), tuple(ways)


def _statistics(loaded: Loaded, settings: Settings) -> Statistics:
    """Ranges and means of the original's tensors, in three passes over some calibration samples."""
    folder, provider = loaded.file.folder, settings.provider
    plain = normal(loaded.file.model, folder, OPSET)
    made = [name for node in plain.graph.node for name in node.output if name]
    macs = max(measure.multiply_adds(dict(loaded.runs[0])), 1)
    samples = list(itertools.islice(loaded.calibration, int(np.clip(_MACS / macs / 3, _FEW, _SAMPLES))))
    names = [*made, *(value.name for value in plain.graph.input)]
    widest = extremes(plain, folder, samples, names, provider)
    spread = histograms(plain, folder, samples, widest, provider)
    clipped = {name: spread[name].clipped() if name in spread else ends for name, ends in widest.items()}
    read = {n.input[0]: 1 for n in plain.graph.node if n.op_type in ("Conv", "Gemm") and n.input[0] in widest}
    means = {name: found.mean for name, found in by_channel(plain, folder, samples[:_FEW], read, provider).items()}
    return Statistics({"extremes": widest, "clipped": clipped}, means, frozenset(names))


def _ways(
    start: Lowering, loaded: Loaded, settings: Settings, references: References, progress: Progress
) -> Iterator[Way]:
    """Loss of each way; ranges and biases are settled first, then what else is quantised, then static or dynamic."""
    schemes = [Scheme("int8", "static", "extremes", linear_only=True)]
    if any(not site.geometry.kernel for site in loaded.sites):
        schemes.append(Scheme("int8", "dynamic"))
    losses: dict[Scheme, float] = {}

    def measured(scheme: Scheme) -> float:
        if scheme not in losses:
            progress(len(losses), 6)
            losses[scheme] = _loss(start.using(**dataclasses.asdict(scheme)), loaded, settings, references)
        return losses[scheme]

    for scheme in schemes:
        measured(scheme)
    best = schemes[0]
    for change in ({"ranges": "clipped"}, {"biases": True}):
        other = dataclasses.replace(best, **change)
        best = min((best, other), key=measured)
    everything = dataclasses.replace(best, linear_only=False)
    measured(everything)
    kept = [s for s in (best, everything, *schemes[1:]) if np.isfinite(losses[s])]
    if not kept:
        raise ModelError("no way to int8 works on this model; leave --precision out")
    times = _times([start.using(**dataclasses.asdict(s)) for s in kept], loaded, settings)
    for scheme, loss in losses.items():
        yield Way(scheme, loss, times[kept.index(scheme)] if scheme in kept else float("nan"))
    progress(6, 6)


def _loss(lowering: Lowering, loaded: Loaded, settings: Settings, references: References) -> float:
    """Loss of the original in a precision; infinite where the converter or the runtime cannot do it."""
    try:
        model = lowering.model(loaded.file.model)
        session = Session(model, provider=settings.provider, threads=0, folder=loaded.file.folder)
        return references.loss(session).value()
    except ModelError:
        return float("inf")


def _times(lowerings: Sequence[Lowering], loaded: Loaded, settings: Settings) -> list[float]:
    """Median milliseconds, turn about."""
    sessions = [
        Session(
            one.model(loaded.file.model),
            provider=settings.provider,
            threads=settings.threads,
            folder=loaded.file.folder,
        )
        for one in lowerings
    ]
    runs = [functools.partial(session.run, loaded.feeds[0]) for session in sessions]
    samples = timing.interleave(runs, rounds=25, seconds=5.0, seed=settings.seed, warmup=1)
    times, _ = samples.of(settings.provider, settings.threads)
    return [float(ms) for ms in np.median(times, axis=0) * 1e3]


def _allowed(settings: Settings) -> float:
    return _SHARE * settings.limit


def _best(ways: Sequence[Way], settings: Settings) -> Way:
    """The fastest of those that leave room for low rank; the one with the least loss where none does.

    A given table of times decides the way: its times are of no other.
    """
    timed = [way for way in ways if np.isfinite(way.ms)]
    if settings.cache.is_file():
        label = read_table(settings.cache)[0].get("precision", "")
        timed = [way for way in timed if way.scheme.label == label] or timed
    fits = [way for way in timed if way.loss <= _allowed(settings)]
    return min(fits, key=_slowness) if fits else min(timed, key=lambda way: (way.loss, way.ms))


def _slowness(way: Way) -> float:
    """Milliseconds, but more operators in 8 bits must be clearly faster than the linear ones alone."""
    return way.ms * (1.0 if way.scheme.linear_only or way.scheme.method == "dynamic" else _CLEARLY)


def _in_float(
    start: Lowering,
    way: Way,
    loaded: Loaded,
    settings: Settings,
    references: References,
    progress: Progress,
) -> Way:
    """Leave nodes in float until the loss leaves room: those first that win most for the work that they are.

    Each linear node is left out alone, and the loss read; then as many as are needed, by bisection.
    """
    macs = {loaded.graph.names[p]: measure.multiply_adds({p: run}) for p, run in loaded.runs[0].items()}
    nodes = [name for name, op in _linear(loaded) if macs.get(name)]

    def loss_without(names: Sequence[str]) -> float:
        scheme = dataclasses.replace(way.scheme, exclude=tuple(names))
        return _loss(start.using(**dataclasses.asdict(scheme)), loaded, settings, references)

    wins = {}
    for done, name in enumerate(nodes):
        progress(done, len(nodes))
        wins[name] = (way.loss - loss_without([name])) / macs[name]
    order = sorted((n for n in nodes if wins[n] > 0), key=lambda n: -wins[n])
    low, high, best = 0, len(order), way
    while low < high:
        middle = (low + high) // 2
        loss = loss_without(order[: middle + 1])
        if loss < best.loss:
            best = Way(dataclasses.replace(way.scheme, exclude=tuple(sorted(order[: middle + 1]))), loss, way.ms)
        if loss <= _allowed(settings):
            high = middle
        else:
            low = middle + 1
    progress(len(nodes), len(nodes))
    return best


def _linear(loaded: Loaded) -> list[tuple[str, str]]:
    protos = zip(loaded.graph.names, loaded.graph.protos, strict=True)
    return [(name, node.op_type) for name, node in protos if node.op_type in LINEAR]
