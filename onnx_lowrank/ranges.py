"""Ranges of activations: one streamed pass for least and largest values, one for histograms; nothing is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lowrank.balance import Spread
from onnx_lowrank.grouping import grouped
from onnx_lowrank.linalg import Array
from onnx_lowrank.quantization import Range
from onnx_lowrank.runtime import Feed, Session, with_outputs

_BINS = 2048
_GROUP = 48  # tensors that are fetched in one run, before it is known how large they are
_GROUP_BYTES = 768 << 20
_LEVELS = 255

Samples = Sequence[Feed]


def extremes(
    model: onnx.ModelProto, folder: Path, samples: Samples, names: Sequence[str], provider: str
) -> dict[str, Range]:
    """Least and largest value of the named tensors over all samples; those that are no finite floats are left out."""
    found: dict[str, Range] = {}

    def add(name: str, value: npt.NDArray[Any]) -> None:
        low, high = float(value.min()), float(value.max())
        if name in found:
            low, high = min(low, found[name][0]), max(high, found[name][1])
        found[name] = (low, high)

    _each(model, folder, samples, names, provider, add)
    return {name: ends for name, ends in found.items() if np.isfinite(ends).all()}


def _each(
    model: onnx.ModelProto,
    folder: Path,
    samples: Samples,
    names: Sequence[str],
    provider: str,
    add: Callable[[str, npt.NDArray[Any]], None],
) -> None:
    """Call `add` with every float32 value of the named tensors; inputs of the model are taken from the samples.

    The first sample shows how large the tensors are; the others are run for as many of them at once as memory allows.
    """
    fed = {value.name for value in model.graph.input}
    sizes: dict[str, int] = {}

    def count(group: Sequence[str], some: Samples) -> None:
        session = Session(with_outputs(model, group), provider=provider, threads=0, folder=folder)
        for sample in some:
            for name, value in zip(group, session.run(sample, group), strict=True):
                sizes[name] = getattr(value, "nbytes", 0)
                if isinstance(value, np.ndarray) and value.dtype == np.float32 and value.size:
                    add(name, value)

    made = [name for name in names if name not in fed]
    for group in grouped(made, lambda _: 1, _GROUP):
        count(group, samples[:1])
    if samples[1:]:
        for group in grouped(made, sizes.__getitem__, _GROUP_BYTES):
            count(group, samples[1:])
    for sample in samples:
        for name in fed.intersection(names).intersection(sample):
            if sample[name].dtype == np.float32 and sample[name].size:
                add(name, sample[name])


@dataclass(frozen=True)
class Histogram:
    """Counts of a tensor's values in equal bins between its extremes."""

    low: float
    high: float
    counts: Array

    def clipped(self) -> Range:
        """The range of 8 bits with the least squared error of rounding and clipping."""
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        middle = (edges[:-1] + edges[1:]) / 2
        best, least = (self.low, self.high), np.inf
        for share in np.linspace(1.0, 0.3, 36):
            low, high = self.low * share, self.high * share
            low, high = min(low, 0.0), max(high, 0.0)
            outside = np.maximum(middle - high, 0) + np.maximum(low - middle, 0)
            step = (high - low) / _LEVELS
            error = float(self.counts @ outside**2 + self.counts.sum() * step**2 / 12)
            if error < least:
                best, least = (low, high), error
        return best


def histograms(
    model: onnx.ModelProto, folder: Path, samples: Samples, ends: Mapping[str, Range], provider: str
) -> dict[str, Histogram]:
    """A second pass: how the values of every tensor are spread between its extremes."""
    found = {name: np.zeros(_BINS) for name, (low, high) in ends.items() if high > low}

    def add(name: str, value: npt.NDArray[Any]) -> None:
        low, high = ends[name]
        bins = ((value.ravel() - low) * (_BINS / (high - low))).astype(np.int32)
        found[name] += np.bincount(np.clip(bins, 0, _BINS - 1), minlength=_BINS)

    _each(model, folder, samples, list(found), provider, add)
    return {name: Histogram(*ends[name], counts) for name, counts in found.items()}


def by_channel(
    model: onnx.ModelProto, folder: Path, samples: Samples, axes: Mapping[str, int], provider: str
) -> dict[str, Spread]:
    """Extremes, means and mean squares by channel.

    Args:
        axes: the axis of the channels, by tensor.
    """
    found: dict[str, list[Array]] = {}

    def add(name: str, value: npt.NDArray[Any]) -> None:
        rows = np.moveaxis(value, axes[name], 0).reshape(value.shape[axes[name]], -1).astype(np.float64)
        low, high, mean, power = rows.min(1), rows.max(1), rows.mean(1), np.mean(rows**2, 1)
        if name not in found:
            found[name] = [low, high, mean, power, np.ones(1)]
        else:
            known = found[name]
            ends = [np.minimum(known[0], low), np.maximum(known[1], high)]
            found[name] = [*ends, known[2] + mean, known[3] + power, known[4] + 1]

    _each(model, folder, samples, list(axes), provider, add)
    return {n: Spread(low, high, total / k, squares / k) for n, (low, high, total, squares, k) in found.items()}
