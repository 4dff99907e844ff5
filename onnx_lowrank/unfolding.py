"""Nested fits: patches of the convolutions' inputs, sampled over the calibration samples, a group of sites a run."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from onnx_lowrank.calibration import blaming
from onnx_lowrank.fragment import Split, split_width
from onnx_lowrank.grouping import grouped
from onnx_lowrank.linalg import Metric
from onnx_lowrank.patches import PER_DIMENSION, output_sizes, sampled
from onnx_lowrank.regression import JointMoments
from onnx_lowrank.runtime import Feed, Session, with_outputs
from onnx_lowrank.separable import Separable, separable
from onnx_lowrank.sites import Site

_GROUP_BYTES = 640 << 20


def nested_fits(
    model: onnx.ModelProto,
    folder: Path,
    sites: Mapping[str, tuple[Site, Mapping[Split, int]]],
    samples: Iterable[Feed],
    *,
    provider: str,
    seed: int,
    metrics: Mapping[str, Metric],
    progress: Callable[[int, int], None],
) -> dict[str, dict[Split, Separable]]:
    """Nested approximations of convolutions, from sampled patches.

    Args:
        sites: by name, with the largest first rank that will be asked for by split.
        metrics: by name, of the outputs that have one.
        progress: called with (groups done, groups).

    Raises:
        DataError: an activation that is not finite.
    """
    count = max(sum(1 for _ in samples), 1)
    groups = list(grouped([site for site, _ in sites.values()], lambda s: 8 * s.geometry.inputs**2, _GROUP_BYTES))
    found: dict[str, dict[Split, Separable]] = {}
    for done, group in enumerate(groups):
        progress(done, len(groups))
        moments = _collected(model, folder, group, samples, count, provider, seed)
        for site in group:
            one = moments.pop(site.name).settled(centred=True)
            weight, metric = site.weight.astype(np.float64), metrics.get(site.name)
            weight = weight if metric is None else metric.root @ weight
            found[site.name] = {
                split: separable(weight, one.second, one.mean, split_width(site.geometry, split), one.count, most)
                for split, most in sites[site.name][1].items()
            }
    progress(len(groups), len(groups))
    return found


def _collected(
    model: onnx.ModelProto,
    folder: Path,
    group: Sequence[Site],
    samples: Iterable[Feed],
    count: int,
    provider: str,
    seed: int,
) -> dict[str, JointMoments]:
    names = list(dict.fromkeys(place.x for site in group for place in site.places))
    session = Session(with_outputs(model, names), provider=provider, threads=0, folder=folder)
    moments = {site.name: JointMoments(site.geometry.inputs) for site in group}
    rngs = {site.name: np.random.default_rng([seed, zlib.crc32(site.name.encode())]) for site in group}
    for sample in samples:
        tensors = dict(zip(names, session.run(sample, names), strict=True))
        for site in group:
            geometry, rng = site.geometry, rngs[site.name]
            wanted = max(math.ceil(PER_DIMENSION * geometry.inputs / count), 16)
            made = [math.prod(output_sizes(tensors[place.x].shape, geometry)) for place in site.places]
            for place, positions in zip(site.places, made, strict=True):
                share = -(-wanted * positions // sum(made))  # by the positions that each has
                with blaming(place.x):
                    moments[site.name].add(sampled(tensors[place.x], geometry, share, rng))
    return moments
