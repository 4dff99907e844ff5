"""Hidden layers that can be made narrower, timed: a candidate for each of the two sites at every width that pays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from onnx_lowrank.allocate import Candidate, Choices
from onnx_lowrank.calibration import Fits
from onnx_lowrank.candidates import MARGIN, MAX_ERROR, macs_per_weight
from onnx_lowrank.chains import Chain, disjoint_chains
from onnx_lowrank.latency import DENSE, LatencyTable
from onnx_lowrank.passes.nystrom import NYSTROM, whole_layer
from onnx_lowrank.prepare import Loaded, Progress
from onnx_lowrank.sites import Geometry
from onnx_lowrank.staircase import TILE, right_edges

_STEPS = 16  # widths are tried at so many equal parts of the layer
_LEAST = 0.1  # of their share of the layer's time: what two sites take at least, whatever the layer saves


def with_layers(
    loaded: Loaded, fits: Fits, table: LatencyTable, choices: Sequence[Choices], progress: Progress
) -> list[Choices]:
    """The choices with the candidates of narrower layers added to both sites of each.

    A layer is timed whole, from the producer's input to the consumer's output; what it saves is shared between the
    two sites as their own dense times are.
    """
    found = {choice.dense.node: choice for choice in choices}
    chains = [c for c in disjoint_chains(loaded.graph, loaded.sites) if fits[c.consumer.name].narrow is not None]
    for done, chain in enumerate(chains):
        progress("layers", done, len(chains))
        times, noise = _times(chain, fits, table)
        table.save()
        names = (chain.producer.name, chain.consumer.name)
        pair = _candidates(chain, loaded, fits, [found[name] for name in names], times, noise)
        for name, candidates in zip(names, pair, strict=True):
            found[name] = dataclasses.replace(found[name], candidates=(*found[name].candidates, *candidates))
    return [found[choice.dense.node] for choice in choices]


def widths(channels: int) -> tuple[int, ...]:
    """Widths worth timing: sixteenths of the layer, in whole tiles, down to an eighth."""
    tried = {round(channels * part / _STEPS / TILE) * TILE for part in range(_STEPS // 8, _STEPS)}
    return tuple(sorted(width for width in tried if TILE <= width < channels))


def layer_geometry(chain: Chain, producer: Geometry, consumer: Geometry) -> Geometry:
    """What a layer's times are kept under: the producer's shapes, both sites and what lies between in its name."""
    name = " ".join((NYSTROM, producer.key(), *(op.op for op in chain.ops), consumer.key()))
    return dataclasses.replace(producer, op=name, outputs=consumer.outputs, then=consumer.then)


def _times(chain: Chain, fits: Fits, table: LatencyTable) -> tuple[dict[int, float], float]:
    """Milliseconds by width, the mean over the shapes, the full width last; and the noise."""
    narrow = fits[chain.consumer.name].narrow
    channels = chain.producer.geometry.outputs
    tried = [w for w in widths(channels) if narrow is not None and narrow.relative(w) <= MAX_ERROR]
    rng = np.random.default_rng(0)
    labels = {DENSE: channels} | {f"{NYSTROM} {width}": width for width in tried}
    makers = {label: functools.partial(whole_layer, chain, rng, width) for label, width in labels.items()}
    shapes = zip(chain.producer.geometries, chain.consumer.geometries, strict=True)
    geometries = [layer_geometry(chain, mine, theirs) for mine, theirs in shapes]
    rows = [table.measure(geometry, makers) for geometry in geometries]
    known = [label for label in labels if all(label in row for row in rows)]
    noise = max(table.noise(geometry) for geometry in geometries)
    return {labels[label]: float(np.mean([row[label] for row in rows])) for label in known}, noise


def _candidates(
    chain: Chain,
    loaded: Loaded,
    fits: Fits,
    choices: Sequence[Choices],
    times: Mapping[int, float],
    noise: float,
) -> tuple[list[Candidate], list[Candidate]]:
    """Candidates of the producer and of the consumer."""
    mine, theirs = (choice.dense.ms_before for choice in choices)
    channels, narrow = chain.producer.geometry.outputs, fits[chain.consumer.name].narrow
    if narrow is None or channels not in times or not mine or not theirs:
        return [], []
    dense = times[channels]
    edges = right_edges({width: ms for width, ms in times.items() if width < channels}, noise)
    pairs = []
    for width, ms in edges.items():
        # What lies between saves time too, at times more than is left to the sites; a row of times that others on the
        # machine made long says so as well. The width stays a candidate, and widths keep their order.
        left = max((mine + theirs - (dense - ms)) / (mine + theirs), _LEAST * ms / dense)
        if ms < dense * (1 - noise - MARGIN):
            first = _half(chain, loaded, width, mine * left, producer=True)
            second = _half(chain, loaded, width, theirs * left, producer=False)
            error = narrow.relative(width)
            pairs.append((first, dataclasses.replace(second, error=error, loss=error)))
    return [first for first, _ in pairs], [second for _, second in pairs]


def _half(chain: Chain, loaded: Loaded, width: int, ms: float, *, producer: bool) -> Candidate:
    site, other = (chain.producer, chain.consumer)[:: 1 if producer else -1]
    weights = site.weight.size * width // chain.producer.geometry.outputs
    return Candidate(NYSTROM, width, 0.0, ms, 0.0, macs_per_weight(site, loaded) * weights, weights, other.name)
