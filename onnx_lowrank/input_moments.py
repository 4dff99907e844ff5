"""Joint moments of what enters sites, sampled over the calibration samples: one collection for every fit of them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lowrank.calibration import blaming
from onnx_lowrank.grouping import grouped
from onnx_lowrank.moments import rows
from onnx_lowrank.patches import enough, output_sizes, sampled
from onnx_lowrank.regression import JointMoments
from onnx_lowrank.runtime import Feed, Session, with_outputs
from onnx_lowrank.sites import Geometry, Site

_GROUP_BYTES = 640 << 20


def input_moments(
    model: onnx.ModelProto,
    folder: Path,
    sites: Sequence[Site],
    many: Collection[str],
    samples: Iterable[Feed],
    *,
    bytes_of: Callable[[Site], int],
    provider: str,
    seed: int,
    progress: Callable[[int, int], None],
) -> Iterator[tuple[Site, JointMoments]]:
    """Each site with the moments of what it reads; of a convolution's patches only as many as are enough.

    What is sampled for a site depends on the site, the samples and the seed alone, not on which others are asked for.
    Sites are run in groups that fit into memory.

    Args:
        many: names of the sites whose patches many are taken of.
        bytes_of: size of a site's input for one sample.
        progress: called with (groups done, groups).

    Raises:
        DataError: an activation that is not finite.
    """
    count = max(sum(1 for _ in samples), 1)
    groups = list(grouped(sites, lambda site: bytes_of(site) + 8 * site.geometry.inputs**2, _GROUP_BYTES))
    for done, group in enumerate(groups):
        progress(done, len(groups))
        wanted = {site.name: enough(site.geometry, count, many=site.name in many) for site in group}
        moments = _collected(model, folder, group, wanted, samples, provider, seed)
        for site in group:
            yield site, moments.pop(site.name)
    progress(len(groups), len(groups))


def _collected(
    model: onnx.ModelProto,
    folder: Path,
    group: Sequence[Site],
    wanted: Mapping[str, int],
    samples: Iterable[Feed],
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
            geometry, read = site.geometry, [(place.x, tensors[place.x]) for place in site.places]
            made = [math.prod(output_sizes(x.shape, geometry)) if geometry.op == "Conv" else 1 for _, x in read]
            for (name, x), positions in zip(read, made, strict=True):
                share = -(-wanted[site.name] * positions // sum(made))  # by the positions that each place has
                with blaming(name):
                    moments[site.name].add(_vectors(geometry, x, share, rngs[site.name]))
    return moments


def _vectors(geometry: Geometry, x: npt.NDArray[Any], patches: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    """The vectors that a site reads, all of them or, of patches and padded positions, a sample."""
    if geometry.op != "Conv":
        first = geometry.trans_a or (geometry.side == "left" and x.ndim > 1)
        return rows(x, -2 if first else -1)
    if geometry.pointwise and not any(geometry.pads):
        strided: tuple[Any, ...] = tuple(slice(None, None, step) for step in geometry.strides)
        return rows(x[(slice(None), slice(None), *strided)], 1)
    return sampled(x, geometry, patches, rng)
