"""What every site could become: ranks on a grid that follows the measured curve, timed at every shape."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from onnx_lowrank import measure
from onnx_lowrank.allocate import Candidate, Choices
from onnx_lowrank.calibration import Fit, Fits
from onnx_lowrank.fragment import Fragment, Kind
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

Ranks = dict[str, set[int]]
"""Ranks by the name of a kind."""


def measured_choices(
    loaded: Loaded, fits: Fits, table: LatencyTable, settings: Settings, progress: Progress
) -> list[Choices]:
    """Time what each distinct geometry could become, and list for every site the candidates that are faster."""
    kinds = {kind.name: kind for kind in KINDS if kind.name in settings.kinds}
    wanted: dict[tuple[Geometry, ...], Ranks] = {}
    for site in loaded.sites:
        ranks = wanted.setdefault(site.geometries, {})
        for name, found in _first_ranks(site, fits[site.name], kinds, table).items():
            ranks.setdefault(name, set()).update(found)
    times: dict[tuple[Geometry, ...], dict[str, float]] = {}
    for done, (geometries, ranks) in enumerate(wanted.items()):
        progress("measure", done, len(wanted))
        times[geometries] = adaptive_times(geometries, ranks, kinds, table)
        table.save()
    progress("measure", len(wanted), len(wanted))
    return [
        _choices(site, loaded, fits[site.name], wanted[site.geometries], times[site.geometries], kinds,
                 max((table.noise(g) for g in site.geometries), default=0.0), unknown=table.lacks(site.geometries))
        for site in loaded.sites
    ]  # fmt: skip


def _first_ranks(site: Site, fit: Fit, kinds: Mapping[str, Kind], table: LatencyTable) -> Ranks:
    """A grid of ranks; of a table that was given, those that it knows."""
    found: Ranks = {}
    geometry = site.geometry
    known = [table.ranks(g) for g in site.geometries] if table.given else []
    for name, kind in kinds.items():
        if kind.applies(geometry):
            grid = set(rank_grid(kind.max_rank(geometry)))
            if known:
                grid = {r for r in set.intersection(*(k.get(name, set()) for k in known)) if r < kind.full(geometry)}
            ranks = {r for r in grid if fit.relative(r, separable=kind.separable) <= MAX_ERROR}
            if ranks:
                found[name] = ranks
    return found


def adaptive_times(
    geometries: tuple[Geometry, ...], ranks: Ranks, kinds: Mapping[str, Kind], table: LatencyTable
) -> dict[str, float]:
    """Milliseconds by label, the mean over the shapes; between steep edges more ranks are timed. Adds to `ranks`."""
    times: dict[str, float] = {}
    for _ in range(1 + (_ON_A_CARD if Provider.of(table.provider).on_device else _REFINEMENTS)):
        labels = {f"{name} {rank}": (kinds[name], rank) for name in ranks for rank in sorted(ranks[name])}
        if not labels.keys() - times.keys():
            break
        times = _mean([_time(geometry, labels, table) for geometry in geometries])
        if DENSE not in times:
            break
        noise = max(table.noise(geometry) for geometry in geometries)
        for name, known in ranks.items():
            ms = {rank: times[f"{name} {rank}"] for rank in known if f"{name} {rank}" in times}
            allowed = range(max(min(known), TILE), max(known) + 1)
            known.update(refine(ms, times[DENSE], noise, allowed))
    return times


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {label: float(np.mean([row[label] for row in rows])) for label in rows[0] if all(label in r for r in rows)}


def _time(geometry: Geometry, labels: Mapping[str, tuple[Kind, int]], table: LatencyTable) -> dict[str, float]:
    """Milliseconds by label. The time depends on shapes only, so the weights are random."""
    rng = np.random.default_rng(0)
    n, k = geometry.outputs, geometry.inputs
    bias = rng.standard_normal(n)

    def dense() -> Fragment:
        return dense_fragment(geometry, rng.standard_normal((n, k)) / k**0.5, bias)

    def factored(kind: Kind, rank: int) -> Fragment:
        first, second = (rng.standard_normal(shape) / shape[1] ** 0.5 for shape in kind.shapes(geometry, rank))
        if not kind.separable:  # the first rows of the identity are pivots without any search
            first = np.vstack([np.eye(rank), rng.uniform(-1, 1, (n - rank, rank)) / (2 * rank)])
        return kind.build(geometry, first, second, bias)

    makers: dict[str, Callable[[], Fragment]] = {DENSE: dense}
    makers |= {label: functools.partial(factored, kind, rank) for label, (kind, rank) in labels.items()}
    return table.measure(geometry, makers)


def _choices(
    site: Site,
    loaded: Loaded,
    fit: Fit,
    ranks: Ranks,
    ms: Mapping[str, float],
    kinds: Mapping[str, Kind],
    noise: float,
    *,
    unknown: bool,
) -> Choices:
    geometry = site.geometry
    positions = macs_per_weight(site, loaded)
    weights = geometry.outputs * geometry.inputs
    dense = Decision(site.name, geometry.op, (geometry.outputs, geometry.inputs), ms_before=ms.get(DENSE))
    small = not any(kind.max_rank(geometry) for kind in KINDS if kind.applies(geometry))
    if unknown or not ranks:
        why = Why.TOO_SMALL if small else Why.NOT_TIMED if unknown else Why.LOSS
        return Choices(dense.keep(why), (), (), positions * weights, weights)
    timed, faster = [], []
    for name, tried in ranks.items():
        by_rank = {rank: ms[f"{name} {rank}"] for rank in tried if f"{name} {rank}" in ms}
        edges = right_edges(by_rank, noise)
        for rank, time in sorted(by_rank.items()):
            error, cost = fit.relative(rank, separable=kinds[name].separable), kinds[name].cost(geometry, rank)
            candidate = Candidate(name, rank, error, time, error, positions * cost, cost)
            timed.append(candidate)
            quick = rank in edges and time < ms[DENSE] * (1 - noise - MARGIN)
            if quick and error <= MAX_ERROR and kinds[name].usable(geometry, fit.left(rank)):
                faster.append(candidate)
    return Choices(dense, tuple(faster), tuple(timed), positions * weights, weights)


def fitting(choice: Choices, site: Site, fit: Fit) -> Choices:
    """The candidates that a repaired fit serves: separable pairs up to its rank, well conditioned pivots.

    A narrower layer asks for nothing: any weight can be narrowed.
    """
    kinds = {kind.name: kind for kind in KINDS}

    def serves(candidate: Candidate) -> bool:
        if candidate.partner is not None:
            return True
        kind, rank = kinds[candidate.kind], candidate.rank
        if kind.separable:
            return fit.separable is not None and rank <= fit.separable.largest
        return kind.usable(site.geometry, fit.left(rank))

    return dataclasses.replace(choice, candidates=tuple(c for c in choice.candidates if serves(c)))


def macs_per_weight(site: Site, loaded: Loaded) -> int:
    """How often every weight of a site is used on the timed sample: its number of output positions."""
    position = site.nodes[0]
    return measure.multiply_adds({position: loaded.runs[0][position]}) // (site.geometry.outputs * site.geometry.inputs)
