"""Fits that need what a site reads: nested ones, fewer channels, factors shared by several. One collection for all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from onnx_lowrank.calibration import shrunk
from onnx_lowrank.chains import Chain, disjoint_chains
from onnx_lowrank.families import Family, families, sets
from onnx_lowrank.fragment import Kind, Split, split_width
from onnx_lowrank.input_moments import input_moments
from onnx_lowrank.linalg import Metric
from onnx_lowrank.moments import MOST
from onnx_lowrank.narrow import Narrow, narrowed
from onnx_lowrank.passes import KINDS
from onnx_lowrank.passes.nystrom import NYSTROM
from onnx_lowrank.passes.pivot import PIVOT
from onnx_lowrank.passes.shared import SHARED
from onnx_lowrank.prepare import Loaded
from onnx_lowrank.projection import Projection, projection
from onnx_lowrank.regression import Joint
from onnx_lowrank.separable import Separable, separable
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Geometry, Site

_MOST_NARROW = 2400  # entries that the reader of a layer reads; time grows with the cube


@dataclasses.dataclass(frozen=True)
class InputFits:
    """What is fitted to the input of one site; `shared` by the names of the sites that would share a factor."""

    nested: Mapping[Split, Separable]
    narrow: Narrow | None
    shared: Mapping[tuple[str, ...], Projection]


def input_fits(
    loaded: Loaded, allowed: Mapping[str, Sequence[str]], settings: Settings, progress: Callable[[int, int], None]
) -> dict[str, InputFits]:
    """The fits of the sites that need any, by name.

    Args:
        allowed: names of the kinds by name of the site; a site that is not in it gets none.
        progress: called with (groups done, groups).

    Raises:
        DataError: an activation that is not finite.
    """
    ranks = {site.name: _largest(site, allowed.get(site.name, ())) for site in loaded.sites}
    joint = settings.policy == "knapsack"  # the baselines do not know kinds of several sites
    layers = {chain.consumer.name: chain for chain in _layers(loaded)}
    chains = {name: chain for name, chain in layers.items() if joint and NYSTROM in allowed.get(name, ())}
    all_families = _families(loaded.sites)
    asking = {name for name, kinds in allowed.items() if joint and SHARED in kinds}
    sharing = {family[0].name: _parts(family, asking) for family in all_families}
    wanted = [site for site in loaded.sites if ranks[site.name] or site.name in chains or sharing.get(site.name)]
    if not wanted:
        return {}
    nested: dict[str, dict[Split, Separable]] = {}
    narrow: dict[str, Narrow] = {}
    shared: dict[str, dict[tuple[str, ...], Projection]] = {}
    collected = input_moments(
        loaded.file.model,
        loaded.file.folder,
        wanted,
        {*layers, *(site.name for family in all_families for site in family)},
        loaded.calibration,
        bytes_of=loaded.input_bytes,
        provider=settings.provider,
        seed=settings.seed,
        progress=progress,
    )
    for site, moments in collected:
        name, known = site.name, moments.settled(centred=site.centred)
        if ranks[name]:
            nested[name] = _nested(site, ranks[name], known, loaded.metrics.get(name))
        if name in chains:
            narrow[name] = _narrow(chains[name], known, loaded.metrics.get(name))
        for members in sharing.get(name, ()):
            names = tuple(one.name for one in members)
            shared.setdefault(names[0], {})[names] = _projection(members, known, loaded.metrics)
    return {
        name: InputFits(nested.get(name, {}), narrow.get(name), shared.get(name, {}))
        for name in {*nested, *narrow, *shared}
    }


def _largest(site: Site, allowed: Sequence[str]) -> dict[Split, int]:
    """The largest first rank that is worth fitting, by the split of the nested kinds that are allowed."""
    found: dict[Split, int] = {}
    if site.geometry.inputs > MOST:
        return found
    for kind in (k for k in KINDS if k.name in allowed and k.split is not None and k.applies(site.geometry)):
        if kind.split is not None and kind.max_rank(site.geometry):
            found[kind.split] = max(found.get(kind.split, 1), _fitted_rank(kind, site.geometry))
    return found


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


def _nested(site: Site, most: Mapping[Split, int], moments: Joint, metric: Metric | None) -> dict[Split, Separable]:
    """Nested approximations of a convolution, up to the largest first rank of each split."""
    weight = site.weight.astype(np.float64)
    weight = weight if metric is None else metric.root @ weight
    return {
        split: separable(
            weight, moments.second, moments.mean, split_width(site.geometry, split), moments.count, largest
        )
        for split, largest in most.items()
    }


def _layers(loaded: Loaded) -> list[Chain]:
    """Layers that may become narrower: small enough, and of patches that can be taken.

    Which layers there are depends on the sites alone, not on the kinds that are asked for: a replay finds the same.
    """

    def fits_in(geometry: Geometry) -> bool:
        return geometry.inputs <= _MOST_NARROW and (geometry.pointwise or len(geometry.kernel) == 2)

    return [c for c in disjoint_chains(loaded.graph, loaded.sites) if fits_in(c.consumer.geometry)]


def _narrow(chain: Chain, moments: Joint, metric: Metric | None) -> Narrow:
    """The fit of the site that reads a layer."""
    site = chain.consumer
    second = shrunk(moments.second, moments.count, lambda: np.eye(site.geometry.inputs))
    weight = site.weight.astype(np.float64)
    weighted = weight if metric is None else metric.root @ weight
    return narrowed(chain.producer.name, weighted, second, moments.mean, math.prod(site.geometry.kernel))


def _families(sites: Sequence[Site]) -> tuple[Family, ...]:
    """Those of the sites that a shared factor can be written for."""
    return families([site for site in sites if PIVOT.applies(site.geometry)])


def _parts(family: Family, asking: Collection[str]) -> list[Family]:
    """The parts of a family whose sites all ask for a shared factor; what they read is sampled for its first site."""
    return [part for part in sets(family) if all(site.name in asking for site in part)]


def _projection(members: Family, moments: Joint, metrics: Mapping[str, Metric]) -> Projection:
    """Of what several sites read, as they read it."""
    second = shrunk(moments.second, moments.count, lambda: np.eye(len(moments.second)))
    weights = [site.weight.astype(np.float64) for site in members]
    return projection(weights, [metrics.get(site.name) for site in members], second, moments.mean)
