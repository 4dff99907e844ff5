"""What costs less as one node is one before anything else is decided: exact, and measured.

Scales and shifts by channel go into the convolutions next to them, and neighbouring linear maps are multiplied.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnx_lowrank import measure
from onnx_lowrank.errors import SettingsError
from onnx_lowrank.files import ModelFile
from onnx_lowrank.graph import Graph, Patch
from onnx_lowrank.latency import DENSE, LatencyTable
from onnx_lowrank.passes.absorb import absorptions
from onnx_lowrank.passes.merge import MERGE, Merge, merges
from onnx_lowrank.passes.survey import Survey, survey
from onnx_lowrank.runtime import Feed, NodeRun, profile
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Site

Runs = tuple[Mapping[int, NodeRun], ...]
Pair = tuple[str, str]
"""Names of what is taken in (several with commas), and of the node that takes it in."""

_PAIR = "pair"


@dataclasses.dataclass(frozen=True)
class Merged:
    """Nodes that became one, those that were taken in by their names; multiply-adds of a run before and after."""

    node: str
    taken_in: str
    macs_before: int
    macs_after: int


@dataclasses.dataclass(frozen=True)
class Read:
    """A model with its graph, what its nodes did in one run for each set of shapes, and its sites."""

    file: ModelFile
    graph: Graph
    runs: Runs
    found: Survey


def read(file: ModelFile, feeds: Sequence[Feed]) -> Read:
    """Run a model once for each set of shapes, and find its sites."""
    graph = Graph(file.model, file.folder)
    runs = tuple(profile(file.model, feed, folder=file.folder) for feed in feeds)
    return Read(file, graph, runs, survey(graph))


def merged(
    known: Read,
    feeds: Sequence[Feed],
    settings: Settings,
    allowed: Callable[[Site, Runs], bool],
    planned: Sequence[Pair] | None,
) -> tuple[Read, tuple[Merged, ...]]:
    """The model with neighbours taken in, until there are no more; the file's own ModelProto stays as it is.

    Args:
        allowed: whether a site may be touched, and was run.
        planned: the pairs of a plan that is replayed; None finds them.

    Raises:
        SettingsError: a pair of the plan is not there.
    """
    done: list[Merged] = []
    left = planned
    if planned is None and not settings.merge:
        return known, ()
    while True:
        patches, fresh = _next(known, settings, allowed, left)
        if not patches:
            break
        graph = Graph(known.file.model, known.file.folder, provenance=settings.provenance)
        for patch in patches:
            graph.apply(patch)
        done += fresh
        left = left and [pair for pair in left if pair not in {(one.taken_in, one.node) for one in fresh}]
        known = read(dataclasses.replace(known.file, model=graph.commit()), feeds)
    if left:
        first, second = sorted(left)[0]
        raise SettingsError(f"the plan takes '{first}' into '{second}', which are no such neighbours in this model")
    return known, tuple(done)


def asked_for(names: Sequence[str], settings: Settings) -> bool:
    """Whether nodes that are changed together may be touched: one of them is included, and none is excluded."""

    def named(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)

    return (not settings.include or named(settings.include)) and not named(settings.exclude)


def _next(
    known: Read, settings: Settings, allowed: Callable[[Site, Runs], bool], planned: Sequence[Pair] | None
) -> tuple[list[Patch], list[Merged]]:
    """Patches of the next round: constants by channel are taken in first, then maps are multiplied."""
    run = known.runs[0]
    shapes = {p: (*one.input_shapes, *one.output_shapes[:1]) for p, one in run.items()}
    patches, done = [], []
    for one in absorptions(known.graph, shapes):
        macs = measure.multiply_adds({one.position: run[one.position]}) if one.position in run else 0
        row = Merged(one.node, ", ".join(one.taken), macs, macs)
        if asked_for((one.node,), settings) if planned is None else (row.taken_in, row.node) in planned:
            patches.append(one.patch)
            done.append(row)
    if patches:
        return patches, done
    found = _wanted(known, settings, allowed, planned)
    rows = [Merged(one.second.name, one.first.name, one.macs_before, one.macs_after) for one in found]
    return [one.patch() for one in found], rows


def _wanted(
    known: Read, settings: Settings, allowed: Callable[[Site, Runs], bool], planned: Sequence[Pair] | None
) -> list[Merge]:
    """The pairs that are to be multiplied next."""
    alone = [site for site in known.found.sites if not site.twins]  # a product would keep the weight of the others
    sites = [site for site in alone if allowed(site, known.runs)]
    sites = [seen(site, known.runs) for site in sites]
    macs = {site.name: measure.multiply_adds({site.nodes[0]: known.runs[0][site.nodes[0]]}) for site in sites}
    wanted = _chooser(settings) if planned is None else lambda one: _is_due(one, planned)
    return [one for one in merges(known.graph, sites, macs, wanted) if isinstance(one, Merge)]


def _is_due(one: Merge, planned: Sequence[Pair]) -> bool:
    """Whether a pair is the next one of a plan for both of its sites."""
    names = {one.first.name, one.second.name}
    return next((pair for pair in planned if names & {*pair}), None) == (one.first.name, one.second.name)


def _chooser(settings: Settings) -> Callable[[Merge], bool]:
    """Whether a product pays: by the clock or a given table, by multiply-adds where neither may be asked."""
    if settings.precision is not None or not (settings.verify_latency or settings.cache.is_file()):
        return lambda one: one.is_cheaper
    where: dict[str, Any] = {"provider": settings.provider, "threads": settings.threads, "seed": settings.seed}
    table = functools.cache(lambda: LatencyTable(settings.cache, **where))
    return lambda one: (one.is_cheaper or (one.is_small and settings.size is None)) and _is_faster(one, table())


def seen(site: Site, runs: Runs) -> Site:
    """A site with the input shapes of the runs, and its twins with theirs."""
    which = 1 if site.geometry.side == "left" else 0
    first, *twins = (
        place.seen(tuple(run[place.nodes[0]].input_shapes[which] for run in runs)) for place in site.places
    )
    return dataclasses.replace(first, twins=tuple(twins))


def _is_faster(one: Merge, table: LatencyTable) -> bool:
    """Whether the product was measured faster than the pair.

    Where a given table knows neither, one of fewer multiply-adds counts as faster. One of more has to be known at
    every shape, and faster by more than the noise.
    """
    name = f"{MERGE} {one.first.geometry.key()} {one.second.geometry.key()}"
    geometries = [dataclasses.replace(geometry, op=name) for geometry in one.product.geometries]
    makers: dict[str, Any] = {DENSE: one.whole, _PAIR: one.pair}
    rows = [table.measure(geometry, makers) for geometry in geometries]
    table.save()
    known = [row for row in rows if len(row) == len(makers)]
    product, pair = (sum(row[label] for row in known) for label in makers)
    if one.is_cheaper:
        return product < pair or not known
    return len(known) == len(rows) and product * (1 + max(map(table.noise, geometries))) < pair
