"""What a grouped core wins over `tucker`, `spatial` and `asym3d`: the figures of decision 076.

python tools/bench_branch.py MODEL.onnx DATA.npz OUT.json NODE …

NODE is a part of the name of a k×k Conv. Of every one, errors are relative ones of its output on held-out samples, with
factors that were improved in turn, and times those of fragments alone, one thread, as shares of the dense one.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lowrank import prepare
from onnx_lowrank.alternating import alternated, best_second
from onnx_lowrank.branching import branched, spread
from onnx_lowrank.fragment import Fragment, Kind, Op, X, Y, split_width, stored
from onnx_lowrank.ladders import Entry, axis, rungs
from onnx_lowrank.latency import DENSE, LatencyTable
from onnx_lowrank.linalg import Array
from onnx_lowrank.moments import Moments
from onnx_lowrank.passes.asym3d import ASYM3D
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.spatial import SPATIAL
from onnx_lowrank.passes.tucker import TUCKER
from onnx_lowrank.patches import enough, sampled
from onnx_lowrank.runtime import Session, with_outputs
from onnx_lowrank.separable import first_filters, separable
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Geometry, Site

OTHERS = {kind.name: kind for kind in (SPATIAL, ASYM3D, TUCKER)}
GROUPS, SHARES, WORK, MOST_ERROR = (2, 4, 8), (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0), 0.25, 0.1
_SWEEPS = 6


class Layer:
    """Weight N×K of a convolution and the second moments of its patches, K×K, fitted to and held out."""

    def __init__(self, site: Site, seen: Moments, held_out: Moments) -> None:
        self.geometry, self.weight = site.geometry, site.weight.astype(np.float64)
        self.covariance, self.mean, self.count = seen.covariance, seen.mean, seen.count
        moved = np.outer(held_out.mean, seen.mean)
        self.held_out = held_out.second - moved - moved.T + np.outer(seen.mean, seen.mean)
        most = min(site.geometry.channels // 2, site.geometry.outputs)
        self.channels = separable(self.weight, self.covariance, self.mean, self.taps, self.count, most)
        self.target = self.weight @ self.covariance
        self.filters = {
            w: first_filters(self.weight, self.covariance, w) for w in {self.taps, site.geometry.kernel[-1]}
        }

    @property
    def taps(self) -> int:
        """Entries of a patch for each channel."""
        return math.prod(self.geometry.kernel)

    def error(self, first: Array, second: Array, width: int) -> float:
        """Relative error on held-out samples of second N×(r·w) after first r×(K/w); biases are of the other samples."""
        made = np.einsum("nrj,rc->ncj", second.reshape(len(second), -1, width), first, optimize=True)
        gone = self.weight - made.reshape(self.weight.shape)
        return float(np.sum((gone @ self.held_out) * gone) / np.sum((self.weight @ self.held_out) * self.weight))


def layers(model: Path, data: Path, names: list[str]) -> dict[str, Layer]:
    """The layers whose nodes are named, by node."""
    loaded = prepare.load(model, str(data), Settings(), lambda *_: None)
    sites = [next(site for site in loaded.sites if name in site.name) for name in names]
    tensors = list(dict.fromkeys(site.x for site in sites))
    session = Session(with_outputs(loaded.file.model, tensors), folder=loaded.file.folder)
    found: list[list[Moments]] = []
    for source in (loaded.calibration, loaded.held_out):
        feeds, rng = list(source), np.random.default_rng(0)
        found.append([Moments(site.geometry.inputs, own_precision=True) for site in sites])
        for feed in feeds:
            values = dict(zip(tensors, session.run(feed, tensors), strict=True))
            for site, moments in zip(sites, found[-1], strict=True):
                wanted = enough(site.geometry, len(feeds))
                moments.add(sampled(values[site.x], site.geometry, wanted, rng))
    return {site.name: Layer(site, *pair) for site, *pair in zip(sites, *found, strict=True)}


def fitted(layer: Layer, kind: str, inner: int, rank: int) -> float:
    """Held-out error of a kind at a size; an inner rank of 0 is none."""
    if kind not in OTHERS:
        groups = int(kind.removeprefix("branch"))
        found = branched(layer.channels, rank, inner, groups, min(2 * inner, layer.channels.largest))
        core = spread(found.core, groups)
        return layer.error(found.first, found.last @ core, layer.taps)
    split = OTHERS[kind].split
    assert split is not None
    width = split_width(layer.geometry, split)
    square = layer.covariance.reshape(-1, width, layer.geometry.inputs // width, width).astype(np.float32)
    limit = rank if inner else 0
    start = layer.filters[width][: inner or rank]
    first = alternated(layer.weight, layer.covariance, start, width, limit, sweeps=_SWEEPS)
    return layer.error(
        first, best_second(first, square, layer.target.reshape(len(layer.weight), -1, width), limit), width
    )


def sizes(layer: Layer) -> list[tuple[str, int, int]]:
    """Kind, inner rank, rank: of the others all on the edge of (multiply-adds, error), of grouped ones a grid."""
    found: list[tuple[str, int, int]] = []
    for kind in OTHERS.values():
        found += _edge(layer, kind)
    channels, outputs = layer.geometry.channels, layer.geometry.outputs
    for groups in GROUPS:
        for s, r in ((round(a * channels), round(b * outputs)) for a in SHARES for b in SHARES):
            work = channels * s + layer.taps * s * r // groups + r * outputs
            most = layer.channels.largest
            if (
                s % (8 * groups) == r % (8 * groups) == 0
                and r <= 2 * s <= 4 * r
                and s <= most
                and work <= WORK * layer.weight.size
            ):
                found.append((f"branch{groups}", s, r))
    return found


def _edge(layer: Layer, kind: Kind) -> list[tuple[str, int, int]]:
    geometry = layer.geometry
    assert kind.split is not None
    most = max(
        r for r in range(1, kind.max_rank(geometry) + 1) if kind.macs(geometry, r, r) <= WORK * layer.weight.size
    )
    width = split_width(geometry, kind.split)
    known = separable(layer.weight, layer.covariance, layer.mean, width, layer.count, most)
    if kind.ranks == 1:
        return [(kind.name, 0, r) for r in range(16, known.largest + 1, 16) if known.relative(r) <= MOST_ERROR]
    inner, outer = axis(known.largest), axis(kind.max_rank(geometry))
    errors = known.errors(inner, outer)
    pairs = [
        Entry(kind.name, r, s, kind.macs(geometry, r, s), float(errors[i, j]), 2)
        for i, s in enumerate(inner)
        for j, r in enumerate(outer)
        if kind.macs(geometry, r, s) <= WORK * layer.weight.size
    ]
    return [(e.kind, e.inner, e.rank) for e in rungs(pairs, MOST_ERROR, len(pairs))]


def fragment(geometry: Geometry, kind: str, inner: int, rank: int) -> Fragment:
    """Random factors: the time depends on shapes only."""
    rng, bias = np.random.default_rng(0), np.zeros(geometry.outputs)
    groups = 1 if kind in OTHERS else int(kind.removeprefix("branch"))
    known = OTHERS.get(kind, TUCKER)
    shapes = list(known.shapes(geometry, *known.size(rank, inner)))
    if groups == 1:
        return known.build(geometry, *(rng.standard_normal(s) / s[1] ** 0.5 for s in shapes), bias)
    shapes[1] = (rank, shapes[1][1] // groups)
    first, core, last = (rng.standard_normal(s) / s[1] ** 0.5 for s in shapes)
    ones = {"kernel_shape": [1] * len(geometry.kernel)}
    arrays = {"a": first, "core": core.reshape(rank, inner // groups, *geometry.kernel), "b": last, "bias": bias}
    for name in "ab":
        arrays[name] = arrays[name].reshape(*arrays[name].shape, *ones["kernel_shape"])
    nodes = (
        Op("down", "Conv", (X, "a"), "thin", ones),
        Op("core", "Conv", ("thin", "core"), "small", {**geometry.conv_attributes, "group": groups}),
        Op("up", "Conv", ("small", "b", "bias"), Y, ones),
    )
    return Fragment(nodes, {name: stored(array, geometry) for name, array in arrays.items()})


def measured(layer: Layer, table: LatencyTable) -> list[dict[str, Any]]:
    """Every size with its share of the dense time and its error; and for grouped cores what they take of the edge."""
    geometry, chosen = layer.geometry, sizes(layer)
    makers = {DENSE: lambda: dense_fragment(geometry, layer.weight, np.zeros(geometry.outputs))}
    labels = {one: f"{one[0]} {one[1]}x{one[2]}" for one in chosen}
    makers |= {label: functools.partial(fragment, geometry, *one) for one, label in labels.items()}
    ms = table.measure(geometry, makers)
    rows: list[dict[str, Any]] = [
        {"kind": k, "inner": s, "rank": r, "time": ms[labels[k, s, r]] / ms[DENSE], "error": fitted(layer, k, s, r)}
        for k, s, r in chosen
    ]
    edge: list[tuple[float, float]] = []
    for row in sorted((row for row in rows if row["kind"] in OTHERS), key=lambda row: row["time"]):
        if not edge or row["error"] < edge[-1][1]:
            edge.append((row["time"], row["error"]))
    times, errors = np.log(np.array(edge).T)
    for row in rows:
        if row["kind"] not in OTHERS and errors[-1] <= math.log(row["error"]) <= errors[0]:
            same = math.exp(np.interp(-math.log(row["error"]), -errors, times))
            row["time over edge"] = row["time"] / same
    return rows


def main() -> None:
    """Measure the layers that are named, write the JSON after each."""
    model, data, out, *names = sys.argv[1:]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        table = LatencyTable(Path(scratch), provider="cpu", threads=1)
        for name, layer in layers(Path(model), Path(data), names).items():
            found[name] = {"key": layer.geometry.key(), "rows": measured(layer, table)}
            Path(out).write_text(json.dumps(found, indent=1) + "\n")
            known = [row for row in found[name]["rows"] if "time over edge" in row]
            for row in sorted(known, key=lambda row: float(row["time over edge"]))[:5]:
                print(name, {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()
