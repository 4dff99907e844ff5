"""Candidates in a precision: timed in it, with what 8 bits add to their error; sites that stay in float, in float."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from onnx_lowrank.allocate import Candidate, Choices
from onnx_lowrank.calibration import Fit
from onnx_lowrank.candidates import MAX_ERROR, measured_choices
from onnx_lowrank.latency import LatencyTable
from onnx_lowrank.layers import with_layers
from onnx_lowrank.noise import mixed_noise, pivot_noise
from onnx_lowrank.passes import KINDS
from onnx_lowrank.passes.pivot import PIVOT
from onnx_lowrank.plan import Decision
from onnx_lowrank.run import Run, latency_table
from onnx_lowrank.sharing import with_shared
from onnx_lowrank.sites import Geometry, Site, Why


def timed_choices(run: Run) -> list[Choices]:
    """Every site's candidates with their measured times; losses are not known yet."""
    floats = set(run.lowering.scheme.exclude) if run.lowering else set()
    outside = [site for site in run.loaded.sites if not floats.isdisjoint(place.name for place in site.places)]
    left = {site.name for site in outside}
    inside = [site for site in run.loaded.sites if site.name not in left]
    found = {choice.dense.node: choice for choice in _timed(run, inside, run.table)}
    if run.lowering is not None and run.lowering.scheme.precision == "int8":
        geometries = {site.name: site.geometry for site in inside}
        found = {node: _noisy(choice, run.fits[node], geometries[node]) for node, choice in found.items()}
    if outside and not run.table.given:
        found |= {choice.dense.node: choice for choice in _timed(run, outside, latency_table(run.settings))}
    return [found.get(site.name) or _untimed(site) for site in run.loaded.sites]


def _timed(run: Run, sites: Sequence[Site], table: LatencyTable) -> list[Choices]:
    """Candidates of some sites, of the hidden layers between two of them, and of those that may share a factor."""
    loaded = dataclasses.replace(run.loaded, sites=tuple(sites))
    choices = measured_choices(loaded, run.fits, table, run.settings, run.clock)
    choices = with_layers(loaded, run.fits, table, choices, run.clock)
    if run.lowering is not None and run.lowering.scheme.precision == "int8":  # what 8 bits do to pivots is not known
        return choices
    return with_shared(loaded, run.fits, table, choices, run.clock)


def _untimed(site: Site) -> Choices:
    """A site that stays in float where only times of the precision are given."""
    return Choices(Decision.of(site).keep(Why.IN_FLOAT), ())


def _noisy(choice: Choices, fit: Fit, geometry: Geometry) -> Choices:
    """The candidates with what 8 bits add to their error; those that are too bad with it are none."""

    def one(candidate: Candidate) -> Candidate:
        added = _added(candidate, fit, geometry)
        return dataclasses.replace(candidate, error=candidate.error + added, loss=candidate.error + added)

    usable = [c for c in map(one, choice.candidates) if c.error <= MAX_ERROR]
    return dataclasses.replace(choice, candidates=tuple(usable))


def _added(candidate: Candidate, fit: Fit, geometry: Geometry) -> float:
    """Nothing where no node is added: a narrower layer is rounded as the layer was."""
    if candidate.partner is not None:
        return 0.0
    kind = next(kind for kind in KINDS if kind.name == candidate.kind)
    if kind is PIVOT:
        return pivot_noise(fit.left(candidate.rank), fit.factorization.values[: candidate.rank])
    shapes = kind.shapes(geometry, *kind.size(candidate.rank, candidate.inner))
    return mixed_noise([shapes[0][1]] if kind.split is None else [columns for _, columns in shapes[1:]])
