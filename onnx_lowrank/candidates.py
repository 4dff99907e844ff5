"""What every site could become: ranks on a grid that follows the measured curve, timed at every shape."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from onnx_lowrank import measure
from onnx_lowrank.allocate import Candidate, Choices
from onnx_lowrank.calibration import Fit, Fits
from onnx_lowrank.fragment import Fragment, Kind, Size, parse_size, size_text
from onnx_lowrank.ladders import LARGEST, Entry, axis, competing, of_terms, rungs
from onnx_lowrank.latency import DENSE, LatencyTable
from onnx_lowrank.passes import KINDS
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.plan import Decision
from onnx_lowrank.prepare import Loaded, Progress
from onnx_lowrank.providers import Provider
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Geometry, Site, Why
from onnx_lowrank.staircase import TILE, rank_grid, refine, right_edges

MAX_ERROR = 0.5
"""A site that loses half of its output's variance is never worth timing."""

MARGIN = 0.02
"""Fraction beyond the noise by which a candidate must beat dense."""

_REFINEMENTS, _ON_A_CARD = 2, 5
"""Rounds of more ranks between steep edges; on a card fragments are quick, and a step is that of a wave of tiles."""

Sizes = dict[str, set[Size]]
"""Sizes by the name of a kind."""


def measured_choices(
    loaded: Loaded, fits: Fits, table: LatencyTable, settings: Settings, progress: Progress
) -> list[Choices]:
    """Time what each distinct geometry could become, and list for every site the candidates that are faster.

    The errors of candidates are algebra on what was fitted: a stage of its own, so that the other is timing alone.
    """
    kinds = {kind.name: kind for kind in KINDS if kind.name in settings.kinds}
    # Work tells time on a CPU only; baselines look at ranks that the knapsack need not.
    every = settings.policy != "knapsack" or Provider.of(table.provider).on_device
    alike: dict[tuple[Geometry, ...], list[Fit]] = {}
    for site in loaded.sites:
        alike.setdefault(site.geometries, []).append(fits[site.name])
    wanted: dict[tuple[Geometry, ...], Sizes] = {}
    steps = len(alike) + len(loaded.sites)
    for done, (geometries, same) in enumerate(alike.items()):
        progress("estimate", done, steps)
        if table.given:
            wanted[geometries] = known_sizes(geometries, same, kinds, table)
        else:
            wanted[geometries] = first_sizes(geometries[0], same, kinds, every=every)
    times: dict[tuple[Geometry, ...], dict[str, float]] = {}
    for done, (geometries, sizes) in enumerate(wanted.items()):
        progress("measure", done, len(wanted))
        times[geometries] = adaptive_times(geometries, sizes, kinds, table)
        table.save()
    progress("measure", len(wanted), len(wanted))
    found = []
    for done, site in enumerate(loaded.sites):
        progress("estimate", len(alike) + done, steps)
        noise = max((table.noise(geometry) for geometry in site.geometries), default=0.0)
        known = (fits[site.name], wanted[site.geometries], times[site.geometries], kinds, noise)
        found.append(_choices(site, loaded, *known, unknown=table.lacks(site.geometries)))
    progress("estimate", steps, steps)
    return found


def first_sizes(geometry: Geometry, fits: Sequence[Fit], kinds: Mapping[str, Kind], *, every: bool) -> Sizes:
    """Sizes to time first, for sites of one geometry: those that compete at one of them.

    Args:
        every: also those that other kinds beat.
    """
    found: Sizes = {}
    for fit in fits:
        entries = [e for kind in kinds.values() if kind.applies(geometry) for e in _entries(kind, geometry, fit)]
        for entry in entries if every else competing(entries):
            found.setdefault(entry.kind, set()).add((entry.rank, entry.inner))
    return found


def _entries(kind: Kind, geometry: Geometry, fit: Fit) -> list[Entry]:
    if kind.ranks == 1:
        grid = [(rank, fit.relative(rank, split=kind.split)) for rank in rank_grid(kind.max_rank(geometry))]
        known = [Entry(kind.name, rank, 0, kind.macs(geometry, rank), error) for rank, error in grid]
        return [entry for entry in known if entry.error <= MAX_ERROR]
    assert kind.split is not None
    nested = fit.nested.get(kind.split)
    if nested is None:
        return []
    if kind.terms > 1:
        few = [
            size for size in of_terms(geometry.channels, geometry.outputs, kind.terms) if kind.allows(geometry, *size)
        ]
        macs = {size: kind.macs(geometry, *size) for size in few}
        return rungs([Entry(kind.name, *s, macs[s], fit.of(kind, geometry, *s), kind.ranks) for s in few], LARGEST)
    inner, outer = axis(nested.largest), axis(kind.max_rank(geometry))
    errors = nested.errors(inner, outer)
    pairs = [
        Entry(kind.name, rank, first, kind.macs(geometry, rank, first), float(errors[i, j]), kind.ranks)
        for i, first in enumerate(inner)
        for j, rank in enumerate(outer)
        if kind.allows(geometry, rank, first)
    ]
    return rungs(pairs, LARGEST)


def known_sizes(
    geometries: tuple[Geometry, ...], fits: Sequence[Fit], kinds: Mapping[str, Kind], table: LatencyTable
) -> Sizes:
    """Sizes that a given table knows for all shapes of a geometry, and that some site can have."""
    found: Sizes = {}
    for label in set.intersection(*(table.labels(geometry) for geometry in geometries)):
        name, _, text = label.rpartition(" ")
        kind, size = kinds.get(name), parse_size(text)
        if kind is None or size is None or not kind.applies(geometries[0]) or (kind.ranks > 1) != (size[1] > 0):
            continue
        if size[0] < kind.full(geometries[0]) and any(f.of(kind, geometries[0], *size) <= MAX_ERROR for f in fits):
            found.setdefault(name, set()).add(size)
    return found


def adaptive_times(
    geometries: tuple[Geometry, ...], sizes: Sizes, kinds: Mapping[str, Kind], table: LatencyTable
) -> dict[str, float]:
    """Milliseconds by label, the mean over geometries; between steep edges more ranks are timed. Adds to `sizes`.

    Dense is timed without any sizes too: a site may gain together with others only.
    """
    times: dict[str, float] = {}
    for _ in range(1 + (_ON_A_CARD if Provider.of(table.provider).on_device else _REFINEMENTS)):
        labels = {label_of(name, size): (kinds[name], size) for name in sizes for size in sorted(sizes[name])}
        if times and not labels.keys() - times.keys():
            break
        times = _mean([_time(geometry, labels, table) for geometry in geometries])
        if DENSE not in times:
            break
        noise = max(table.noise(geometry) for geometry in geometries)
        for name, known in sizes.items():
            if kinds[name].ranks > 1:
                continue
            ms = {rank: times[f"{name} {rank}"] for rank, _ in known if f"{name} {rank}" in times}
            ranks = [rank for rank, _ in known]
            allowed = range(max(min(ranks), TILE), max(ranks) + 1)
            known.update((rank, 0) for rank in refine(ms, times[DENSE], noise, allowed))
    return times


def label_of(kind: str, size: Size) -> str:
    """What a fragment's time is kept under."""
    return f"{kind} {size_text(*size)}"


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {label: float(np.mean([row[label] for row in rows])) for label in rows[0] if all(label in r for r in rows)}


def _time(geometry: Geometry, labels: Mapping[str, tuple[Kind, Size]], table: LatencyTable) -> dict[str, float]:
    """Milliseconds by label. The time depends on shapes only, so the weights are random."""
    rng = np.random.default_rng(0)
    n, k = geometry.outputs, geometry.inputs
    bias = rng.standard_normal(n)

    def dense() -> Fragment:
        return dense_fragment(geometry, rng.standard_normal((n, k)) / k**0.5, bias)

    def factored(kind: Kind, size: Size) -> Fragment:
        shapes, rank = kind.shapes(geometry, *kind.size(*size)), size[0]
        parts = [rng.standard_normal(shape) / shape[1] ** 0.5 for shape in shapes]
        if kind.split is None:  # the first rows of the identity are pivots without any search
            parts[0] = np.vstack([np.eye(rank), rng.uniform(-1, 1, (n - rank, rank)) / (2 * rank)])
        return kind.build(geometry, *parts, bias)

    makers: dict[str, Callable[[], Fragment]] = {DENSE: dense}
    makers |= {label: functools.partial(factored, kind, size) for label, (kind, size) in labels.items()}
    return table.measure(geometry, makers)


def _choices(
    site: Site,
    loaded: Loaded,
    fit: Fit,
    sizes: Sizes,
    ms: Mapping[str, float],
    kinds: Mapping[str, Kind],
    noise: float,
    *,
    unknown: bool,
) -> Choices:
    geometry = site.geometry
    ms = {label: time * len(site.places) for label, time in ms.items()}
    positions = macs_per_weight(site, loaded)
    weights = geometry.outputs * geometry.inputs
    dense = Decision.of(site, ms.get(DENSE))
    small = not any(kind.max_rank(geometry) for kind in KINDS if kind.applies(geometry))
    if unknown or not sizes:
        why = Why.TOO_SMALL if small else Why.NOT_TIMED if unknown else Why.LOSS
        return Choices(dense.keep(why), (), (), positions * weights, weights)
    timed, faster = [], []
    for name, tried in sizes.items():
        kind = kinds[name]
        known = [size for size in tried if label_of(name, size) in ms]
        steps = sorted(known, key=lambda size: (kind.macs(geometry, *size), size))
        by_step = {step: ms[label_of(name, size)] for step, size in enumerate(steps)}
        edges = right_edges(by_step, noise)
        for step, size in enumerate(steps):
            error, cost, time = fit.of(kind, geometry, *size), kind.macs(geometry, *size), by_step[step]
            candidate = Candidate(name, size[0], error, time, error, positions * cost, cost, inner=size[1])
            timed.append(candidate)
            quick = step in edges and time < ms[DENSE] * (1 - noise - MARGIN)
            if quick and error <= MAX_ERROR and fit.serves(kind, geometry, *size):
                faster.append(candidate)
    return Choices(dense, tuple(faster), tuple(timed), positions * weights, weights)


def fitting(choice: Choices, site: Site, fit: Fit) -> Choices:
    """The candidates that a repaired fit serves: separable pairs up to its rank, well conditioned pivots.

    A narrower layer and a shared factor ask for nothing: any weight can be narrowed, or projected.
    """
    kinds = {kind.name: kind for kind in KINDS}

    def serves(candidate: Candidate) -> bool:
        if candidate.partner is not None or candidate.sharers:
            return True
        return fit.serves(kinds[candidate.kind], site.geometry, candidate.rank, candidate.inner)

    return dataclasses.replace(choice, candidates=tuple(c for c in choice.candidates if serves(c)))


def served(choices: Iterable[Choices], sites: Iterable[Site], fits: Fits) -> list[Choices]:
    """All sites' candidates that their fits serve, which a repair may have moved."""
    return [fitting(choice, site, fits[site.name]) for choice, site in zip(choices, sites, strict=True)]


def macs_per_weight(site: Site, loaded: Loaded) -> int:
    """How often every weight of a site is used on the timed sample: its number of output positions."""
    runs = {place.nodes[0]: loaded.runs[0][place.nodes[0]] for place in site.places}
    return measure.multiply_adds(runs) // (site.geometry.outputs * site.geometry.inputs)
