"""Repair with data: factors fitted anew to what the original computes, on inputs that the rewritten prefix gives.

A rewritten site gets inputs that the sites before it have already disturbed. Group by group in the order of the graph,
the rewritten prefix and the original run side by side; the site's target is the original's output, its input the
disturbed one (ALGORITHMS §6: asymmetric reconstruction, arXiv 1505.06798; mixed target, PIFA-M, arXiv 2501.19090).
Where the site's output is added to a residual stream, the target is the original's sum less the disturbed stream, so
that the site also takes back what the stream has gone wrong by.
At the size that was chosen, nested factors are alternated, and where a ReLU alone reads the output, the last factor is
fitted to what it lets through. No labels, no gradients.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

import numpy as np

from onnx_lowrank import measure
from onnx_lowrank.calibration import Fit, Fits, blaming
from onnx_lowrank.chains import disjoint_chains
from onnx_lowrank.families import common
from onnx_lowrank.fragment import Size, split_width
from onnx_lowrank.graph import Graph
from onnx_lowrank.grouping import grouped
from onnx_lowrank.linalg import Metric, factor_gram
from onnx_lowrank.moments import MOST, rows
from onnx_lowrank.passes import KINDS
from onnx_lowrank.passes.nystrom import NYSTROM
from onnx_lowrank.passes.shared import SHARED
from onnx_lowrank.patches import positions, unfolded
from onnx_lowrank.plan import Decision
from onnx_lowrank.polish import Seen, Task, polished
from onnx_lowrank.prepare import Loaded
from onnx_lowrank.regression import JointMoments, towards
from onnx_lowrank.rewrite import rewritten
from onnx_lowrank.runtime import Session, with_outputs
from onnx_lowrank.separable import first_filters, nested_least_squares
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Site

_SHARE = 0.5  # m of the mixed target
_MACS = 7.5e11  # multiply-adds that all passes together may take, where the least passes and samples allow it
_PASSES = (3, 8)  # over the data: least and most
_GROUP_BYTES = 384 << 20
_SAMPLES = 32  # at least, where there are so many
_POSITIONS_PER_DIMENSION = 2
_KEPT = 4096  # vectors to fit a last factor to what a ReLU lets through

Group = tuple[Site, ...]


def effort(macs: int, count: int) -> tuple[int, int]:
    """Passes over the data and samples in each, more of them for a model that is quickly run.

    Args:
        macs: multiply-adds of the model.
        count: calibration samples.
    """
    least = min(_SAMPLES, count)
    runs = _MACS / max(macs, 1)
    passes = int(np.clip(runs / max(least, 1), *_PASSES))
    return passes, int(np.clip(runs / passes, least, count))


def cost(macs: int, count: int) -> float:
    """Multiply-adds of one refit, all passes together; arguments as of `effort`."""
    passes, samples = effort(macs, count)
    return float(macs) * passes * samples  # of the original and of the prefix, half of each in the mean


def groups(sites: Sequence[Site], decisions: Sequence[Decision], passes: int) -> list[Group]:
    """The rewritten sites that can be refitted, in the order of the graph, a group for every pass over the data."""
    chosen = {d.node for d in decisions if d.kind}
    usable = [site for site in sites if site.name in chosen and _usable(site)]
    units = _units(usable, {d.node for d in decisions if d.kind == SHARED})
    most = max(math.ceil(len(units) / passes), 1)

    def size_of(unit: Group) -> int:
        return sum(8 * site.geometry.inputs**2 for site in unit)

    return [tuple(itertools.chain(*group)) for group in grouped(units, size_of, _GROUP_BYTES, most)]


def _units(sites: Sequence[Site], sharing: Collection[str]) -> list[Group]:
    """The sites one by one, those that share a factor together: the prefix has all of them or none."""
    units: dict[Hashable, list[Site]] = {}
    for site in sites:
        units.setdefault(common(site) if site.name in sharing else site.name, []).append(site)
    return [tuple(unit) for unit in units.values()]


def _usable(site: Site) -> bool:
    g = site.geometry
    return g.inputs <= MOST and g.groups == 1 and g.op != "ConvTranspose" and not site.twins


def refit(
    loaded: Loaded,
    settings: Settings,
    fits: Fits,
    decisions: Sequence[Decision],
    keep: Callable[[Group, Fits], bool],
    progress: Callable[[int, int], None],
    near: Mapping[str, Collection[Size]] | None = None,
) -> Fits:
    """Fits of all sites, those of the rewritten ones repaired group by group.

    Args:
        keep: whether a group's new fits, given with all others, are taken.
        progress: called with (groups done, groups).
        near: other sizes of the same kinds by site, (rank, inner rank), whose factors are to be polished too.

    Raises:
        DataError: an activation that is not finite.
    """
    known = dict(fits)
    count = sum(1 for _ in loaded.calibration)
    passes, samples = effort(measure.multiply_adds(dict(loaded.runs[0])), count)
    kinds = {d.node: d for d in decisions if d.kind}
    layers = {c.consumer.name: c.producer.name for c in disjoint_chains(loaded.graph, loaded.sites)}
    layers = {name: producer for name, producer in layers.items() if name in kinds and kinds[name].kind == NYSTROM}
    order = groups([site for site in loaded.sites if site.name not in layers.values()], decisions, passes)
    done: list[Decision] = []
    for index, group in enumerate(order):
        progress(index, len(order))
        moments = _joint(loaded, settings, known, done, group, samples)
        fresh = {
            site.name: _fit(
                site,
                moments.pop(site.name),
                kinds[site.name],
                (near or {}).get(site.name, ()),
                loaded.metrics.get(site.name),
                known.get(site.name),
            )
            for site in group
        }
        if keep(group, {**known, **fresh}):
            known |= fresh
        done += [kinds[name] for s in group for name in (s.name, layers.get(s.name)) if name is not None]
    progress(len(order), len(order))
    return known


@dataclasses.dataclass
class Collected:
    """What one pass over the data says about a site: joint moments, and some vectors where a ReLU reads its output."""

    moments: JointMoments
    x: list[np.ndarray] = dataclasses.field(default_factory=list)
    y: list[np.ndarray] = dataclasses.field(default_factory=list)

    def seen(self, site: Site) -> Seen | None:
        """The vectors, with the mixed target."""
        if not self.x:
            return None
        x = np.concatenate(self.x)
        x = x.astype(np.promote_types(x.dtype, np.float32), copy=False)
        target = x @ site.weight.astype(x.dtype).T
        target += site.bias_vector.astype(x.dtype)
        target *= 1 - _SHARE
        target += _SHARE * np.concatenate(self.y)
        return Seen(x, target)


def _joint(
    loaded: Loaded, settings: Settings, fits: Fits, done: Sequence[Decision], group: Group, samples: int
) -> dict[str, Collected]:
    """Moments of the disturbed inputs with the targets, for every site of a group, in one pass."""
    file = loaded.file
    disturbed = [name for s in group for name in (s.x, *(s.joins or ())[1:])]
    wanted = [s.joins[0] if s.joins else s.y for s in group]
    prefix = with_outputs(rewritten(file, loaded.sites, fits, done), list(dict.fromkeys(disturbed)))
    whole = with_outputs(file.model, list(dict.fromkeys(wanted)))
    sessions = [Session(m, provider=settings.provider, threads=0, folder=file.folder) for m in (prefix, whole)]
    found = {site.name: Collected(JointMoments(site.geometry.inputs, site.geometry.outputs)) for site in group}
    bent = {site.name for site in group if rectifies(loaded.graph, site)}
    rng = np.random.default_rng(settings.seed)
    for sample in itertools.islice(loaded.calibration, samples):
        x, y = (dict(zip(s.output_names, s.run(sample), strict=True)) for s in sessions)
        for site in group:
            target = y[site.joins[0]] - x[site.joins[1]] if site.joins else y[site.y]
            vectors = max(math.ceil(_POSITIONS_PER_DIMENSION * site.geometry.inputs / samples), 64)
            pair, one = _pairs(site, x[site.x], target, vectors, rng), found[site.name]
            with blaming(site.x):
                one.moments.add(*pair)
            if site.name in bent:
                step = max(len(pair[0]) * samples // _KEPT, 1)
                one.x.append(pair[0][::step].copy())
                one.y.append(pair[1][::step].copy())
    return found


def rectifies(graph: Graph, site: Site) -> bool:
    """Whether a ReLU alone reads a site's output."""
    readers = graph.readers(site.y)
    return len(readers) == 1 and site.y not in graph.outputs and graph.protos[readers[0]].op_type == "Relu"


def _pairs(
    site: Site, x: np.ndarray, y: np.ndarray, wanted: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Input vectors and output vectors of a site at the same positions."""
    geometry = site.geometry
    if geometry.op == "Conv":
        where = positions(x.shape, geometry, wanted, rng)
        batch, *corners = where.T
        return unfolded(x, geometry, where), y[(batch, slice(None), *corners)]
    axis = 0 if geometry.trans_a else -1
    if geometry.side == "left" and len(geometry.x_shape) > 1:
        return rows(x, -2), rows(y, -2)
    return rows(x, axis), rows(y, -1)


def _fit(
    site: Site,
    found: Collected,
    decision: Decision,
    near: Collection[Size],
    metric: Metric | None,
    before: Fit | None,
) -> Fit:
    """Factors of the moved weight; a layer's order of channels and shared projections, made of all samples, stay."""
    moments = found.moments.settled(centred=site.centred)
    weight, second = site.weight.astype(np.float64), moments.second
    target = towards(weight, second, moments.cross, moments.count, _SHARE)
    linear = target @ moments.mean
    weighted = target if metric is None else metric.root @ target
    spectrum = factor_gram(weighted @ second @ weighted.T)
    narrow = None if before is None else before.narrow
    shared = {} if before is None else before.shared
    evidence = None if before is None else before.evidence
    fit = Fit(spectrum, moments.mean_y, linear, target, {}, metric, narrow, shared=shared, evidence=evidence)
    kind = next((kind for kind in KINDS if kind.name == decision.kind), None)
    if kind is None:
        return fit
    seen, polished_ = found.seen(site), {}
    chosen = (decision.rank or 1, decision.inner)
    width = 1 if kind.split is None else split_width(site.geometry, kind.split)
    filters = None if kind.split is None else first_filters(weighted, second, width)
    for size in sorted({chosen, *near}, reverse=True):
        one = fit
        if kind.split is not None and filters is not None:
            # For each size on its own: its bits must not depend on which others are asked for.
            first = filters[: kind.filters(site.geometry, *size)]
            nested = nested_least_squares(weighted, second, moments.mean, width, moments.count, first)
            one = dataclasses.replace(fit, nested={kind.split: nested})
        if kind.split is not None or seen is not None:
            task = Task(weighted, second, moments.mean, seen)
            polished_[(kind.name, *size)] = polished(site, one, kind, size, task, alternate=size == chosen)
        if size == chosen:
            fit = one
    return dataclasses.replace(fit, polished=polished_)
