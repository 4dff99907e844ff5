"""Narrow fits: second moments of the layers between two sites, a group of layers a run."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lowrank.calibration import blaming, shrunk
from onnx_lowrank.chains import Chain
from onnx_lowrank.grouping import grouped
from onnx_lowrank.linalg import Metric
from onnx_lowrank.moments import rows
from onnx_lowrank.narrow import Narrow, narrowed
from onnx_lowrank.patches import sampled
from onnx_lowrank.regression import JointMoments
from onnx_lowrank.runtime import Feed, Session, with_outputs
from onnx_lowrank.sites import Geometry, Site

_GROUP_BYTES = 512 << 20
_PER_DIMENSION = 12  # sampled patches for each of their entries; with fewer, the error looks better than it is
_MOST = 2400  # entries that a consumer reads; time grows with the cube


def fits_in(chain: Chain) -> bool:
    """Whether the layer's second moment is small enough, and its patches can be taken."""
    g = chain.consumer.geometry
    return g.inputs <= _MOST and (g.pointwise or len(g.kernel) == 2)


def narrow_fits(
    model: onnx.ModelProto,
    folder: Path,
    chains: Sequence[Chain],
    samples: Iterable[Feed],
    *,
    bytes_of: Callable[[Site], int],
    provider: str,
    seed: int,
    metrics: Mapping[str, Metric],
    progress: Callable[[int, int], None],
) -> dict[str, Narrow]:
    """Narrow fits of the consumers, by name.

    Args:
        bytes_of: size of a site's input for one sample.
        metrics: by name, of the outputs that have one.
        progress: called with (groups done, groups).

    Raises:
        DataError: an activation that is not finite.
    """
    count = max(sum(1 for _ in samples), 1)
    size = _GROUP_BYTES
    groups = list(grouped(chains, lambda c: bytes_of(c.consumer) + 16 * c.consumer.geometry.inputs**2, size))
    found: dict[str, Narrow] = {}
    for done, group in enumerate(groups):
        progress(done, len(groups))
        moments = input_moments(model, folder, [c.consumer for c in group], samples, count, provider, seed)
        for chain in group:
            name = chain.consumer.name
            found[name] = _narrow(chain, moments.pop(name), metrics.get(name))
    progress(len(groups), len(groups))
    return found


def _narrow(chain: Chain, moments: JointMoments, metric: Metric | None) -> Narrow:
    site = chain.consumer
    found = moments.settled(centred=site.centred)
    second = shrunk(found.second, found.count, lambda: np.eye(site.geometry.inputs))
    weight = site.weight.astype(np.float64)
    weighted = weight if metric is None else metric.root @ weight
    return narrowed(chain.producer.name, weighted, second, found.mean, math.prod(site.geometry.kernel))


def input_moments(
    model: onnx.ModelProto,
    folder: Path,
    sites: Sequence[Site],
    samples: Iterable[Feed],
    count: int,
    provider: str,
    seed: int,
) -> dict[str, JointMoments]:
    """Moments of what enters some sites, by their names; of a convolution's patches only as many as are enough.

    Args:
        count: how many samples there are.

    Raises:
        DataError: an activation that is not finite.
    """
    names = list(dict.fromkeys(site.x for site in sites))
    session = Session(with_outputs(model, names), provider=provider, threads=0, folder=folder)
    moments = {site.name: JointMoments(site.geometry.inputs) for site in sites}
    rngs = {site.name: np.random.default_rng([seed, zlib.crc32(site.name.encode())]) for site in sites}
    for sample in samples:
        tensors = dict(zip(names, session.run(sample, names), strict=True))
        for site in sites:
            with blaming(site.x):
                moments[site.name].add(_read(site.geometry, tensors[site.x], count, rngs[site.name]))
    return moments


def _read(geometry: Geometry, x: npt.NDArray[Any], count: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    """The vectors that a site reads, all of them or, of patches and padded positions, a sample."""
    if geometry.op != "Conv":
        first = geometry.trans_a or (geometry.side == "left" and x.ndim > 1)
        return rows(x, -2 if first else -1)
    if geometry.pointwise and not any(geometry.pads):
        strided: tuple[Any, ...] = tuple(slice(None, None, step) for step in geometry.strides)
        return rows(x[(slice(None), slice(None), *strided)], 1)
    return sampled(x, geometry, max(math.ceil(_PER_DIMENSION * geometry.inputs / count), 16), rng)
