"""Projections that sites may share: second moments of what their families read, a group of families a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from onnx_lowrank.calibration import shrunk
from onnx_lowrank.families import Family, sets
from onnx_lowrank.grouping import grouped
from onnx_lowrank.linalg import Metric
from onnx_lowrank.narrowing import input_moments
from onnx_lowrank.projection import Projection, projection
from onnx_lowrank.regression import Joint
from onnx_lowrank.runtime import Feed
from onnx_lowrank.sites import Site

_GROUP_BYTES = 512 << 20


def projections(
    model: onnx.ModelProto,
    folder: Path,
    families: Sequence[Family],
    samples: Iterable[Feed],
    *,
    bytes_of: Callable[[Site], int],
    provider: str,
    seed: int,
    metrics: Mapping[str, Metric],
    progress: Callable[[int, int], None],
) -> dict[str, dict[tuple[str, ...], Projection]]:
    """By the first site of each set that may share a factor, and by the names of all.

    Args:
        bytes_of: size of a site's input for one sample.
        metrics: by name, of the outputs that have one.
        progress: called with (groups done, groups).

    Raises:
        DataError: an activation that is not finite.
    """
    count = max(sum(1 for _ in samples), 1)
    groups = list(grouped(families, lambda f: bytes_of(f[0]) + 16 * f[0].geometry.inputs ** 2, _GROUP_BYTES))
    found: dict[str, dict[tuple[str, ...], Projection]] = {}
    for done, group in enumerate(groups):
        progress(done, len(groups))
        moments = input_moments(model, folder, [family[0] for family in group], samples, count, provider, seed)
        for family in group:
            known = moments.pop(family[0].name).settled(centred=family[0].centred)
            for members in sets(family):
                names = tuple(site.name for site in members)
                found.setdefault(names[0], {})[names] = _fitted(members, known, metrics)
    progress(len(groups), len(groups))
    return found


def _fitted(members: Family, moments: Joint, metrics: Mapping[str, Metric]) -> Projection:
    second = shrunk(moments.second, moments.count, lambda: np.eye(len(moments.second)))
    weights = [site.weight.astype(np.float64) for site in members]
    return projection(weights, [metrics.get(site.name) for site in members], second, moments.mean)
