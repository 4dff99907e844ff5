"""From a model file to sites with shapes and spectra."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx_lowrank import synthetic
from onnx_lowrank.branches import BORDER, Opening, candidates
from onnx_lowrank.calibration import Fit, Fits, collect, factorize
from onnx_lowrank.chains import disjoint_chains
from onnx_lowrank.conditions import always_taken
from onnx_lowrank.data import Source, open_source, split
from onnx_lowrank.errors import DataError, ModelError
from onnx_lowrank.families import families
from onnx_lowrank.files import ModelFile, read_model
from onnx_lowrank.fragment import Kind, Split
from onnx_lowrank.functions import inlined
from onnx_lowrank.fused import open_fused
from onnx_lowrank.graph import Graph
from onnx_lowrank.inputs import InputSpec
from onnx_lowrank.linalg import Metric
from onnx_lowrank.merging import Merged, Pair, merged, read
from onnx_lowrank.moments import MOST
from onnx_lowrank.narrow import Narrow
from onnx_lowrank.narrowing import fits_in, narrow_fits
from onnx_lowrank.passes import KINDS
from onnx_lowrank.passes.nystrom import NYSTROM
from onnx_lowrank.passes.pivot import PIVOT
from onnx_lowrank.passes.shared import SHARED
from onnx_lowrank.projecting import projections
from onnx_lowrank.projection import Projection
from onnx_lowrank.reached import left_out, reachable, same_shape
from onnx_lowrank.runtime import Feed, NodeRun, Session
from onnx_lowrank.separable import Separable
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Geometry, Keep, Site, Why
from onnx_lowrank.unfolding import nested_fits

Progress = Callable[[str, int, int], None]
"""Called with the stage, the steps done and the steps in all."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that runs on its data: sites with shapes, everything else with a reason.

    `file` holds the model with the branches of `opening` opened; what is built of it is to be closed again.
    `feeds` are the inputs of every timing, one for each set of shapes; `runs` are their profiled runs. `metrics` tell
    which errors of a site's output matter to the sites that read it, where only sites do. `merged` are neighbours
    that became one node: `file.model` has the products.
    """

    file: ModelFile
    graph: Graph
    source: Source
    calibration: Source
    held_out: Source
    shared: bool
    feeds: tuple[Feed, ...]
    runs: tuple[Mapping[int, NodeRun], ...]
    sites: tuple[Site, ...]
    kept: tuple[Keep, ...]
    opening: Opening
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    merged: tuple[Merged, ...] = ()


def load(path: Path, data: Any, settings: Settings, progress: Progress, merges: Sequence[Pair] | None = None) -> Loaded:
    """Read the model, open the data, run one sample, multiply neighbours, find the sites.

    Args:
        merges: the neighbours that a plan has multiplied; None finds them.

    Raises:
        ModelError, DataError, SettingsError, RuntimeMissing: one line each.
    """
    progress("read", 0, 1)
    file = read_model(path)
    if settings.inline_functions:
        file = inlined(file)
    source, feeds = _tried(file, data, settings)
    calibration, held_out, shared = split(source)
    opening = _opening(file, source, feeds, settings)
    file = open_fused(dataclasses.replace(file, model=opening.flat))
    known, done = merged(
        read(file, feeds), feeds, settings, lambda site, runs: left_out(site, runs, settings) is None, merges
    )
    file, graph, runs, found = known.file, known.graph, known.runs, known.found
    sites, dropped = reachable(found.sites, runs, settings)
    inside = opening.inside()
    sites = tuple(
        dataclasses.replace(
            site, joins=site.joins if same_shape(graph, runs[0], site) else None, branch=inside.get(site.y, "")
        )
        for site in sites
    )
    kept = [keep for keep in found.kept if not keep.node.startswith(BORDER)]
    kept += [Keep(node.name, node.op_type, Why.NOT_EXECUTED) for node in opening.untaken()]
    progress("read", 1, 1)
    return Loaded(
        file, graph, source, calibration, held_out, shared, feeds, runs, sites, (*kept, *dropped), opening, merged=done
    )


def _opening(file: ModelFile, source: Source, feeds: Sequence[Feed], settings: Settings) -> Opening:
    """Branches that all samples take, opened; none where a precision is made, whose converters rewrite every node."""
    if settings.precision not in (None, "fp32") or not candidates(file.model):
        return Opening.none(file.model)
    return always_taken(file.model, file.folder, (source, feeds), settings.provider)


def _tried(file: ModelFile, data: Any, settings: Settings) -> tuple[Source, tuple[Feed, ...]]:
    """What `open_inputs` gives, once the first sample has run; the session is gone before others are opened."""
    session = Session(file.path, provider=settings.provider, threads=settings.threads)
    source, feeds = open_inputs(session, data, settings)
    _try(session, source)
    return source, feeds


def _try(session: Session, source: Source) -> None:
    """Run the first sample.

    Raises:
        ModelError: the model fails on it.
    """
    try:
        session.run(next(iter(source)))
    except ModelError as fault:
        if not source.synthetic:
            raise
        raise ModelError(f"{fault}; the inputs were made up: give --shape NAME:1,3,224,224 or real --data") from None


def open_inputs(session: Session, data: Any, settings: Settings) -> tuple[Source, tuple[Feed, ...]]:
    """The samples, and the inputs of every timing.

    Raises:
        DataError, SettingsError: no samples, or data or shapes that do not fit the model.
    """
    specs = [InputSpec(name, dtype, shape) for name, dtype, shape in session.inputs()]
    shapes = settings.shapes[0] if settings.shapes and data is None else None
    source = open_source(specs, data, limit=settings.samples, seed=settings.seed, shapes=shapes)
    first = next(iter(source), None)
    if first is None:
        raise DataError(f"{source.description}: no samples; give at least one")
    return source, _timing_feeds(specs, settings, first)


def _timing_feeds(specs: Sequence[InputSpec], settings: Settings, first: Feed) -> tuple[Feed, ...]:
    """The first sample, or synthetic ones of each set of shapes that is asked for."""
    if not settings.shapes:
        return (first,)
    sizes = [synthetic.resolve_shapes(specs, shapes) for shapes in settings.shapes]
    return tuple(next(synthetic.samples(specs, size, settings.seed)) for size in sizes)


def calibrate(
    loaded: Loaded, settings: Settings, progress: Progress, decided: Mapping[str, Sequence[str]] | None = None
) -> Fits:
    """Moments over the calibration samples, then one factorization per site.

    Args:
        decided: kinds by name of the sites that a plan needs fits of; all sites and kinds when None.
    """
    sites = tuple(site for site in loaded.sites if decided is None or site.name in decided)

    def bytes_of(site: Site) -> int:
        runs = [loaded.runs[0][place.nodes[0]] for place in site.places]
        shapes = [run.input_shapes if site.tap == "input" else run.output_shapes for run in runs]
        return sum(4 * max(math.prod(shape) for shape in given) for given in shapes)

    moments = collect(
        loaded.file.model,
        loaded.file.folder,
        sites,
        loaded.calibration,
        bytes_of=bytes_of,
        provider=settings.provider,
        progress=lambda done, total: progress("calibrate", done, total),
    )
    allowed = {site.name: settings.kinds if decided is None else decided[site.name] for site in sites}
    separated = _separated(loaded, sites, allowed, settings, progress)
    narrow = _narrow(loaded, allowed, settings, progress)
    shared = _shared(loaded, allowed, settings, progress)
    fits: dict[str, Fit] = {}
    for done, site in enumerate(sites):
        progress("factor", done, len(sites))
        fit = factorize(site, moments[site.taps], loaded.metrics.get(site.name))
        name = site.name
        nested = separated.get(name, {})
        evidence = fit.evidence
        if evidence is not None and nested:
            evidence = dataclasses.replace(evidence, patches=max(one.count for one in nested.values()))
        fit = dataclasses.replace(fit, nested=nested, narrow=narrow.get(name), evidence=evidence)
        fits[name] = dataclasses.replace(fit, shared=shared.get(name, {}))
    progress("factor", len(sites), len(sites))
    return fits


def _fitted_rank(kind: Kind, geometry: Geometry) -> int:
    """Ranks near the break-even of multiply-adds are never faster, and what is kept grows with their square.

    Two equal ranks that take three tenths of the work bound the inner one: above that a kind of one rank is better.
    Terms are mixed of as many filters as their kind ever reads, whatever other kinds ask for.
    """
    if kind.inner_full is not None and kind.terms > 1:
        return kind.inner_full(geometry)
    if kind.inner_full is not None:
        limit = geometry.outputs * geometry.inputs * 3 // 10
        most = min(kind.full(geometry), kind.inner_full(geometry))
        return next((r for r in range(most, 1, -1) if kind.macs(geometry, r, r) <= limit), 1)
    return max(kind.max_rank(geometry) * 3 // 4, 1)


def _separated(
    loaded: Loaded,
    sites: tuple[Site, ...],
    allowed: Mapping[str, Sequence[str]],
    settings: Settings,
    progress: Progress,
) -> dict[str, dict[Split, Separable]]:
    """Nested fits of the sites that an allowed nested kind applies to."""
    wanted: dict[str, tuple[Site, dict[Split, int]]] = {}
    for site in (s for s in sites if s.geometry.inputs <= MOST):
        kinds = [k for k in KINDS if k.name in allowed[site.name] and k.applies(site.geometry)]
        most: dict[Split, int] = {}
        for kind in (k for k in kinds if k.split is not None and k.max_rank(site.geometry)):
            assert kind.split is not None
            most[kind.split] = max(most.get(kind.split, 1), _fitted_rank(kind, site.geometry))
        if most:
            wanted[site.name] = (site, most)
    if not wanted:
        return {}
    return nested_fits(
        loaded.file.model,
        loaded.file.folder,
        wanted,
        loaded.calibration,
        provider=settings.provider,
        seed=settings.seed,
        metrics=loaded.metrics,
        progress=lambda done, total: progress("unfold", done, total),
    )


def _narrow(
    loaded: Loaded, allowed: Mapping[str, Sequence[str]], settings: Settings, progress: Progress
) -> dict[str, Narrow]:
    """Narrow fits of the consumers that may read fewer channels; which layers these are depends on the sites alone."""
    chains = [c for c in disjoint_chains(loaded.graph, loaded.sites) if fits_in(c)]
    chains = [c for c in chains if NYSTROM in allowed.get(c.consumer.name, ())]
    if not chains or settings.policy != "knapsack":  # the baselines do not know it
        return {}
    return narrow_fits(
        loaded.file.model,
        loaded.file.folder,
        chains,
        loaded.calibration,
        bytes_of=lambda site: 4 * max(math.prod(shape) for shape in loaded.runs[0][site.nodes[0]].input_shapes),
        provider=settings.provider,
        seed=settings.seed,
        metrics=loaded.metrics,
        progress=lambda done, total: progress("narrow", done, total),
    )


def _shared(
    loaded: Loaded, allowed: Mapping[str, Sequence[str]], settings: Settings, progress: Progress
) -> dict[str, dict[tuple[str, ...], Projection]]:
    """Projections of what several sites read, by the first of them and the names of all."""
    wanted = [site for site in loaded.sites if SHARED in allowed.get(site.name, ())]
    found = families([site for site in wanted if PIVOT.applies(site.geometry)])
    if not found or settings.policy != "knapsack":  # the baselines do not know it
        return {}
    return projections(
        loaded.file.model,
        loaded.file.folder,
        found,
        loaded.calibration,
        bytes_of=lambda site: 4 * max(math.prod(shape) for shape in loaded.runs[0][site.nodes[0]].input_shapes),
        provider=settings.provider,
        seed=settings.seed,
        metrics=loaded.metrics,
        progress=lambda done, total: progress("share", done, total),
    )
