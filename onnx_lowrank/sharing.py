"""Sites that may share their first factor, timed: a candidate for each of them at every rank that pays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from onnx_lowrank.allocate import Candidate, Choices
from onnx_lowrank.calibration import Fits, shared_fit
from onnx_lowrank.candidates import MARGIN, MAX_ERROR, macs_per_weight
from onnx_lowrank.families import Family, families, sets
from onnx_lowrank.fragment import Fragment
from onnx_lowrank.latency import DENSE, LatencyTable
from onnx_lowrank.layers import widths
from onnx_lowrank.passes.shared import SHARED, Pivots, most_rank, shared_cost, shared_factor, side_by_side
from onnx_lowrank.prepare import Loaded, Progress
from onnx_lowrank.projection import Projection
from onnx_lowrank.sites import Geometry
from onnx_lowrank.staircase import right_edges


def with_shared(
    loaded: Loaded, fits: Fits, table: LatencyTable, choices: Sequence[Choices], progress: Progress
) -> list[Choices]:
    """The choices with the candidates of common factors added to all sites of each set that may share one.

    A set is timed whole; what it saves is shared between its sites as their multiply-adds are. Sites of hidden layers
    that may become narrower are left to those.
    """
    found = {choice.dense.node: choice for choice in choices}
    layered = {node for node, choice in found.items() if len(choice.ranked) < len(choice.candidates)}
    wanted = [one for family in families(loaded.sites) for one in sets(family) if _fitted(one, fits) is not None]
    wanted = [one for one in wanted if layered.isdisjoint(site.name for site in one)]
    timed = []
    for done, members in enumerate(wanted):
        progress("share", done, len(wanted))
        timed.append(_times(members, fits, table))
        table.save()
    for done, (members, (times, noise)) in enumerate(zip(wanted, timed, strict=True)):
        progress("estimate", done, len(wanted))
        for name, candidates in _candidates(members, loaded, fits, found, times, noise).items():
            found[name] = dataclasses.replace(found[name], candidates=(*found[name].candidates, *candidates))
    return [found[choice.dense.node] for choice in choices]


def _fitted(members: Family, fits: Fits) -> Projection | None:
    names = tuple(site.name for site in members)
    return fits[names[0]].shared.get(names)


def set_geometry(geometries: Sequence[Geometry]) -> Geometry:
    """What the times of a set are kept under: the shapes of all sites in its name."""
    name = " ".join((SHARED, *(geometry.key() for geometry in geometries)))
    return dataclasses.replace(geometries[0], op=name, outputs=sum(geometry.outputs for geometry in geometries))


def random_set(geometries: Sequence[Geometry], rank: int) -> Fragment:
    """Sites on a common factor of random weights, to be timed; rank 0 is dense."""
    rng = np.random.default_rng(0)
    names, inputs = [f"site{i}" for i in range(len(geometries))], geometries[0].inputs
    shapes = [(geometry.outputs, rank or inputs) for geometry in geometries]
    owner = int(np.argmax([outputs for outputs, _ in shapes]))
    if rank:
        shapes[owner] = (shapes[owner][0] - rank, rank)
    weights = [rng.standard_normal(shape) / shape[1] ** 0.5 for shape in shapes]
    if not rank:
        return side_by_side(names, geometries, weights)
    down = rng.standard_normal((rank, inputs)) / inputs**0.5
    biases = [np.zeros(geometry.outputs) for geometry in geometries]
    return shared_factor(names, geometries, Pivots(owner, slice(0, rank), tuple(weights)), down, biases)


def _times(members: Family, fits: Fits, table: LatencyTable) -> tuple[dict[int, float], float]:
    """Milliseconds by rank, the mean over the shapes, those of the dense sites at 0; and the noise."""
    found = _fitted(members, fits)
    assert found is not None
    most, count = most_rank([site.geometry for site in members]), range(len(members))
    tried = [r for r in widths(most + 1) if max(found.relative(i, r) for i in count) <= MAX_ERROR]
    labels = {DENSE: 0} | {f"{SHARED} {rank}": rank for rank in tried}
    rows, noise = [], 0.0
    for geometries in zip(*(site.geometries for site in members), strict=True):
        makers = {label: functools.partial(random_set, geometries, rank) for label, rank in labels.items()}
        rows.append(table.measure(set_geometry(geometries), makers))
        noise = max(noise, table.noise(set_geometry(geometries)))
    known = [label for label in labels if all(label in row for row in rows)]
    return {labels[label]: float(np.mean([row[label] for row in rows])) for label in known}, noise


def _candidates(
    members: Family,
    loaded: Loaded,
    fits: Fits,
    choices: Mapping[str, Choices],
    times: Mapping[int, float],
    noise: float,
) -> dict[str, list[Candidate]]:
    """Candidates of every site, by its name."""
    names = tuple(site.name for site in members)
    before = [choices[name].dense.ms_before or 0.0 for name in names]
    made: dict[str, list[Candidate]] = {name: [] for name in names}
    projection = _fitted(members, fits)
    if projection is None or 0 not in times or min(before) <= 0:
        return made
    geometries = [site.geometry for site in members]
    positions = macs_per_weight(members[0], loaded)
    for rank, ms in right_edges({rank: ms for rank, ms in times.items() if rank}, noise).items():
        left = sum(before) * ms / times[0]
        if ms >= times[0] * (1 - noise - MARGIN):
            continue
        pivots = Pivots.of([shared_fit(site, fits[site.name], projection, rank)[0] for site in members])
        if not pivots.usable(geometries[0]):
            continue
        costs = shared_cost(geometries, pivots.owner, rank)
        for index, (name, cost) in enumerate(zip(names, costs, strict=True)):
            error, share = projection.relative(index, rank), left * cost / sum(costs)
            made[name].append(Candidate(SHARED, rank, error, share, error, positions * cost, cost, sharers=names))
    return made
