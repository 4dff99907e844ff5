"""One pass over the samples: moments at every site, a group of tensors a run, no activation kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx

from onnx_lowrank.branching import Branched, branched
from onnx_lowrank.errors import DataError
from onnx_lowrank.evidence import FEW, Evidence, evidence_of
from onnx_lowrank.fragment import Kind, Split
from onnx_lowrank.grouping import grouped
from onnx_lowrank.linalg import Array, Factorization, Metric, correct_bias, factor_gram, factor_groups, factor_input
from onnx_lowrank.moments import Moments, rows
from onnx_lowrank.narrow import Narrow
from onnx_lowrank.projection import Projection
from onnx_lowrank.runtime import Feed, Session, with_outputs
from onnx_lowrank.separable import Separable
from onnx_lowrank.sites import Geometry, Site, Tap

_GROUP_BYTES = 512 << 20
Taps = tuple[Tap, ...]
"""Tensors that moments are taken of together: sites that read the same ones share them."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """What the calibration samples say about one site.

    Attributes:
        factorization: the spectrum, exact at every rank.
        mean: of the site's output, N.
        linear: mean of W x, N: `mean` without the bias.
        weight: N×K, what the factors approximate; None is the site's own weight.
        nested: the nested approximations of a 2-D convolution by their split, where they were asked for.
        metric: in which both are best; None is the plain one.
        polished: better factors by kind, rank and inner rank, the corrected bias last.
        narrow: the same site on fewer channels of the layer that it reads, where it may be made narrower.
        shared: projections of the site's input for it and other sites, by their names; it is the first of them.
        evidence: how much it stands on.
    """

    factorization: Factorization
    mean: Array
    linear: Array
    weight: Array | None = None
    nested: Mapping[Split, Separable] = dataclasses.field(default_factory=dict)
    metric: Metric | None = None
    narrow: Narrow | None = None
    polished: Mapping[tuple[str, int, int], tuple[Array, ...]] = dataclasses.field(default_factory=dict)
    shared: Mapping[tuple[str, ...], Projection] = dataclasses.field(default_factory=dict)
    evidence: Evidence | None = None

    def left(self, rank: int) -> Array:
        """The left factor at a rank, N×r."""
        basis = self.factorization.basis[:, :rank]
        return basis if self.metric is None else self.metric.inverse @ basis

    def of(self, kind: Kind, geometry: Geometry, rank: int, inner: int = 0) -> float:
        """Relative error of the site's output as a kind at a size, in its metric; 1 where there is no such fit."""
        if kind.split is None or kind.terms == 1:
            return self.relative(rank, inner, split=kind.split)
        terms = self.terms(kind, geometry, rank, inner)
        return 1.0 if terms is None else terms.relative

    def terms(self, kind: Kind, geometry: Geometry, rank: int, inner: int) -> Branched | None:
        """The terms of a kind that has several, at a size; None where the nested fit has too few filters."""
        known, filters = self.nested.get(kind.split or "channels"), kind.filters(geometry, rank, inner)
        if known is None or filters > known.largest or not kind.allows(geometry, rank, inner):
            return None
        return branched(known, rank, inner, kind.terms, filters)

    def relative(self, rank: int, inner: int = 0, *, split: Split | None = None) -> float:
        """Relative error of the site's output at a size, in its metric; 1 where there is no such approximation."""
        if split is None:
            return self.factorization.relative(rank)
        known, first = self.nested.get(split), inner or rank
        if known is None or first > known.largest:
            return 1.0
        return float(known.errors([inner], [rank])[0, 0]) if inner else known.relative(rank)

    def serves(self, kind: Kind, geometry: Geometry, rank: int, inner: int = 0) -> bool:
        """Whether the kind can be built at a size: nested fits up to their rank, well conditioned left factors."""
        if (kind.name, rank, inner) in self.polished:
            return True
        if kind.split is None:
            return kind.usable(geometry, self.left(rank))
        known = self.nested.get(kind.split)
        return known is not None and kind.filters(geometry, rank, inner) <= known.largest


Fits = Mapping[str, Fit]
"""By name of the site."""


@contextmanager
def blaming(tensor: str) -> Iterator[None]:
    """Turn a refusal of values into an error that names the tensor.

    Raises:
        DataError: in place of a ValueError.
    """
    try:
        yield
    except ValueError as fault:
        raise DataError(f"tensor '{tensor}' of the model: {fault}; check the data's scale") from None


def collect(
    model: onnx.ModelProto,
    folder: Path,
    sites: Sequence[Site],
    samples: Iterable[Feed],
    *,
    bytes_of: Callable[[Site], int],
    provider: str,
    progress: Callable[[int, int], None],
) -> dict[Taps, Moments]:
    """Moments over all samples of what every site taps; those of a site with twins are of all its places together.

    Args:
        bytes_of: size of a site's tapped tensors for one sample; groups stay below 512 MB.
        progress: called with (groups done, groups).

    Raises:
        DataError: an activation that is not finite.
    """
    found: dict[Taps, Moments] = {}
    groups = list(grouped(sites, lambda site: bytes_of(site) + 16 * _width(site) ** 2, _GROUP_BYTES))
    for done, group in enumerate(groups):
        progress(done, len(groups))
        names = list(dict.fromkeys(tensor for site in group for tensor, _ in site.taps))
        session = Session(with_outputs(model, names), provider=provider, threads=0, folder=folder)
        widths = {site.taps: _width(site) for site in group}
        found |= {taps: Moments(width) for taps, width in widths.items()}
        for sample in samples:
            tensors = dict(zip(names, session.run(sample, names), strict=True))
            for taps in widths:
                for tensor, axis in taps:
                    with blaming(tensor):
                        found[taps].add(rows(tensors[tensor], axis))
    progress(len(groups), len(groups))
    return found


def _width(site: Site) -> int:
    return site.geometry.inputs if site.tap == "input" else site.geometry.outputs


def factorize(site: Site, moments: Moments, metric: Metric | None = None) -> Fit:
    """The spectrum of a site in a metric of its output, exact at every rank, and the mean of its output."""
    weight = site.weight.astype(np.float64)
    second = moments.covariance if site.centred else moments.second
    known = evidence_of(site, second, moments.count)
    if site.geometry.groups > 1:
        spectrum = _by_group(site, second, moments.count)
        return Fit(spectrum, moments.mean, moments.mean - site.bias_vector, evidence=known)
    if site.tap == "output":
        gram = shrunk(second, moments.count, lambda: weight @ weight.T)
        spectrum = factor_gram(gram if metric is None else metric.root @ gram @ metric.root)
        return Fit(spectrum, moments.mean, moments.mean - site.bias_vector, metric=metric, evidence=known)
    identity = shrunk(second, moments.count, lambda: np.eye(site.geometry.inputs))
    linear = weight @ moments.mean
    spectrum = factor_input(weight if metric is None else metric.root @ weight, identity)
    return Fit(spectrum, linear + site.bias_vector, linear, metric=metric, evidence=known)


def _by_group(site: Site, second: Array, count: int) -> Factorization:
    """The spectrum of a grouped convolution; what groups have in common is not used, nor who reads them."""
    rows = site.geometry.outputs // site.geometry.groups
    weights = site.weight.astype(np.float64).reshape(site.geometry.groups, rows, -1)
    blocks = (second[i * rows : (i + 1) * rows, i * rows : (i + 1) * rows] for i in range(site.geometry.groups))
    return factor_groups(
        [shrunk(gram, count, lambda w=w: w @ w.T) for gram, w in zip(blocks, weights, strict=True)]  # type: ignore[misc]
    )


def shrunk(second: Array, count: int, target: Callable[[], Array]) -> Array:
    """Shrink a second moment towards that of white inputs where positions are few: below `FEW` per dimension.

    Args:
        second: of `count` vectors.
        target: second moment of white inputs, at any scale.
    """
    width = len(second)
    if count >= FEW * width:
        return second
    white = target()
    power = float(np.trace(white))
    if power <= 0 or not math.isfinite(power):
        return second
    share = width / (width + count)
    return (1 - share) * second + share * white * (float(np.trace(second)) / power)


def fitted(site: Site, fit: Fit, rank: int) -> tuple[Array, Array, Array]:
    """Low rank: left N×r, right r×K ((g·r)×K for g groups) and the corrected bias (N) of a site."""
    weight = site.weight.astype(np.float64) if fit.weight is None else fit.weight
    left, groups = fit.left(rank), site.geometry.groups
    if groups > 1:
        blocks = left.reshape(groups, -1, left.shape[1])
        right = (blocks.swapaxes(1, 2) @ weight.reshape(groups, -1, weight.shape[1])).reshape(-1, weight.shape[1])
        computed = (blocks @ (blocks.swapaxes(1, 2) @ fit.linear.reshape(groups, -1, 1))).reshape(-1)
        return left, right, fit.mean - computed if site.centred else site.bias_vector
    read = fit.factorization.basis[:, :rank].T
    if fit.metric is not None:
        read = read @ fit.metric.root
    bias = correct_bias(left, read, fit.linear, fit.mean) if site.centred else site.bias_vector
    return left, read @ weight, bias


def factors(site: Site, fit: Fit, kind: Kind, rank: int, inner: int = 0) -> tuple[Array, ...]:
    """What a kind is built of at a size: its factors, and last the corrected bias (N).

    Raises:
        ValueError: a nested kind for a site that was not fitted so.
    """
    if (known := fit.polished.get((kind.name, rank, inner))) is not None:
        return known
    if kind.split is None:
        return fitted(site, fit, rank)
    if kind.split not in fit.nested:
        raise ValueError(f"site {site.name} has no nested fit of its {kind.split}")
    nested = fit.nested[kind.split]
    parts: tuple[Array, ...]
    if kind.terms > 1:
        terms = branched(nested, rank, inner, kind.terms, kind.filters(site.geometry, rank, inner))
        parts, computed = (terms.first, terms.core, terms.last), terms.computed
    else:
        first, second, computed = nested.factors(inner or rank)
        parts = (first, second)
        if inner:
            left = nested.spectrum(inner).basis[:, :rank]
            parts, computed = (first, left.T @ second, left), left @ (left.T @ computed)
    if fit.metric is not None:
        parts, computed = (*parts[:-1], fit.metric.inverse @ parts[-1]), fit.metric.inverse @ computed
    return *parts, fit.mean - computed


def shared_fit(site: Site, fit: Fit, found: Projection, rank: int) -> tuple[Array, Array]:
    """Left factor (N×r) and corrected bias (N) of a site on a projection of its input that it shares with others."""
    weight = site.weight.astype(np.float64) if fit.weight is None else fit.weight
    left = found.left(weight, rank)
    if not site.centred:
        return left, site.bias_vector
    return left, fit.mean - fit.linear + weight @ found.mean - left @ (found.right(rank) @ found.mean)


def narrow_fit(site: Site, fit: Fit, width: int) -> tuple[Array, Array]:
    """Weight (N×K, columns of channels that go are zero) and corrected bias (N) of a site at a width.

    Raises:
        ValueError: a site that reads no layer that may be made narrower.
    """
    if fit.narrow is None:
        raise ValueError(f"site {site.name} has no narrow fit")
    weight = site.weight.astype(np.float64) if fit.weight is None else fit.weight
    full = fit.narrow.scattered(weight, width)
    if not site.centred:
        return full, site.bias_vector
    # Not `fit.mean - full μ`: μ may be of sampled patches, and the mean of the output of all positions.
    return full, fit.mean - fit.linear + (weight - full) @ fit.narrow.mean
