"""From a model file to sites with spectra and measured candidates: everything that a decision needs."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lowrank.allocate import Candidate, Choices, rank_grid, right_edges
from onnx_lowrank.calibration import collect, factorize
from onnx_lowrank.data import Source, open_source, split
from onnx_lowrank.errors import DataError
from onnx_lowrank.files import ModelFile, read_model
from onnx_lowrank.fragment import Fragment, Kind
from onnx_lowrank.graph import Graph
from onnx_lowrank.inputs import InputSpec
from onnx_lowrank.latency import DENSE, LatencyTable
from onnx_lowrank.linalg import Array, Factorization
from onnx_lowrank.passes import KINDS
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.plan import Decision
from onnx_lowrank.runtime import Feed, NodeRun, Session, profile
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Geometry, Keep, Site, Why

Progress = Callable[[str, int, int], None]
"""Called with the stage, the steps done and the steps in all."""

_MAX_ERROR = 0.25  # a site that loses a quarter of its output's variance is never worth timing
_NOISE = 0.02  # of a fragment's median, interleaved on one thread
_MARGIN = 0.03  # a candidate counts as faster when it beats dense by more than the noise


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that runs on its data: sites with shapes, everything else with a reason."""

    file: ModelFile
    graph: Graph
    source: Source
    calibration: Source
    held_out: Source
    shared: bool
    first: Feed
    runs: Mapping[int, NodeRun]
    sites: tuple[Site, ...]
    kept: tuple[Keep, ...]


@dataclasses.dataclass(frozen=True)
class Fit:
    """What the calibration samples say about one site: the spectrum, and the mean of its output."""

    factorization: Factorization
    mean: Array


def load(path: Path, data: Any, settings: Settings, progress: Progress) -> Loaded:
    """Read the model, open the data, run one sample, find the sites.

    Raises:
        ModelError, DataError, SettingsError, RuntimeMissing: one line each.
    """
    progress("read", 0, 1)
    file = read_model(path)
    session = Session(file.path, provider=settings.provider, threads=settings.threads)
    specs = [InputSpec(name, dtype, shape) for name, dtype, shape in session.inputs()]
    source = open_source(specs, data, limit=settings.samples, seed=settings.seed, shapes=settings.shapes)
    calibration, held_out, shared = split(source)
    first = next(iter(source), None)
    if first is None:
        raise DataError(f"{source.description}: no samples; give at least one")
    session.run(first)
    graph = Graph(file.model, file.folder)
    runs = profile(file.model, first, folder=file.folder)
    found = survey(graph)
    sites, dropped = _reachable(found.sites, runs, settings)
    progress("read", 1, 1)
    return Loaded(file, graph, source, calibration, held_out, shared, first, runs, sites, (*found.kept, *dropped))


def _reachable(
    sites: tuple[Site, ...], runs: Mapping[int, NodeRun], settings: Settings
) -> tuple[tuple[Site, ...], tuple[Keep, ...]]:
    """The sites that are asked for and were executed, with their input shapes."""
    kept, left = [], []
    for site in sites:
        why = _left_out(site, runs, settings)
        if why is not None:
            left.append(Keep(site.name, site.geometry.op, why))
            continue
        run = runs[site.nodes[0]]
        kept.append(site.seen(run.input_shapes[1 if site.geometry.side == "left" else 0]))
    return tuple(kept), tuple(left)


def _left_out(site: Site, runs: Mapping[int, NodeRun], settings: Settings) -> Why | None:
    matches = [fnmatch.fnmatchcase(site.name, pattern) for pattern in settings.include]
    if (settings.include and not any(matches)) or any(fnmatch.fnmatchcase(site.name, p) for p in settings.exclude):
        return Why.EXCLUDED
    run = runs.get(site.nodes[0])
    if run is None or any(math.prod(shape) == 0 for shape in run.output_shapes):
        return Why.NOT_EXECUTED
    return None


def calibrate(loaded: Loaded, sites: tuple[Site, ...], settings: Settings, progress: Progress) -> dict[str, Fit]:
    """Moments over the calibration samples, then one factorization per site."""

    def bytes_of(site: Site) -> int:
        run = loaded.runs[site.nodes[0]]
        shapes = run.input_shapes if site.tap == "input" else run.output_shapes
        return 4 * max(math.prod(shape) for shape in shapes)

    moments = collect(
        loaded.file.model,
        loaded.file.folder,
        sites,
        loaded.calibration,
        bytes_of=bytes_of,
        provider=settings.provider,
        progress=lambda done, total: progress("calibrate", done, total),
    )
    fits = {}
    for done, site in enumerate(sites):
        progress("factor", done, len(sites))
        fits[site.name] = Fit(*factorize(site, moments[(site.tensor, site.channel_axis)]))
    progress("factor", len(sites), len(sites))
    return fits


def kinds_of(settings: Settings) -> tuple[Kind, ...]:
    """The kinds that may be used, in their order."""
    return tuple(kind for kind in KINDS if kind.name in settings.kinds)


def measure(
    sites: tuple[Site, ...], fits: Mapping[str, Fit], table: LatencyTable, settings: Settings, progress: Progress
) -> list[Choices]:
    """Time what each distinct geometry could become, and list for every site the candidates that are faster."""
    wanted: dict[Geometry, dict[str, tuple[Kind, int]]] = {}
    for site in sites:
        wanted.setdefault(site.geometry, {}).update(_worth_timing(site, fits[site.name].factorization, settings))
    times: dict[Geometry, dict[str, float]] = {}
    for done, (geometry, labels) in enumerate(wanted.items()):
        progress("measure", done, len(wanted))
        times[geometry] = _time(geometry, labels, table)
        table.save()
    progress("measure", len(wanted), len(wanted))
    return [
        _choices(site, fits[site.name].factorization, wanted[site.geometry], times[site.geometry]) for site in sites
    ]


def _worth_timing(site: Site, factorization: Factorization, settings: Settings) -> dict[str, tuple[Kind, int]]:
    labels: dict[str, tuple[Kind, int]] = {}
    for kind in kinds_of(settings):
        if not kind.applies(site.geometry):
            continue
        for rank in rank_grid(kind.max_rank(site.geometry)):
            if factorization.relative(rank) <= _MAX_ERROR:
                labels[f"{kind.name} {rank}"] = (kind, rank)
    return labels


def _time(geometry: Geometry, labels: Mapping[str, tuple[Kind, int]], table: LatencyTable) -> dict[str, float]:
    """Milliseconds by label. The time depends on shapes only, so the weights are random."""
    rng = np.random.default_rng(0)
    n, k = geometry.outputs, geometry.inputs
    bias = rng.standard_normal(n)

    def dense() -> Fragment:
        return dense_fragment(geometry, rng.standard_normal((n, k)) / k**0.5, bias)

    def factored(kind: Kind, rank: int) -> Fragment:
        left = np.linalg.qr(rng.standard_normal((n, rank)))[0]
        return kind.build(geometry, left, rng.standard_normal((rank, k)) / k**0.5, bias)

    makers: dict[str, Callable[[], Fragment]] = {DENSE: dense}
    makers |= {label: functools.partial(factored, kind, rank) for label, (kind, rank) in labels.items()}
    return table.measure(geometry, makers) if labels else {}


def _choices(
    site: Site, factorization: Factorization, labels: Mapping[str, tuple[Kind, int]], ms: Mapping[str, float]
) -> Choices:
    geometry = site.geometry
    dense = Decision(site.name, geometry.op, (geometry.outputs, geometry.inputs), ms_before=ms.get(DENSE))
    if not labels:
        small = all(not kind.max_rank(geometry) for kind in KINDS if kind.applies(geometry))
        return Choices(dense.keep(Why.TOO_SMALL if small else Why.LOSS), ())
    candidates = []
    for name in {kind.name for kind, _ in labels.values()}:
        by_rank = {rank: ms[f"{kind.name} {rank}"] for kind, rank in labels.values() if kind.name == name}
        for rank, time in right_edges(by_rank, _NOISE).items():
            if time < ms[DENSE] * (1 - _MARGIN) and factorization.relative(rank) <= _MAX_ERROR:
                error = factorization.relative(rank)
                candidates.append(Candidate(name, rank, error, time, loss=error))
    return Choices(dense, tuple(sorted(candidates, key=lambda c: (c.ms, c.kind, c.rank))))
