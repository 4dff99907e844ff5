"""Which errors of a site's output matter: what the sites that read it make of them.

A consumer computes `W₂ φ(y)`, so an error e of y reaches it as `W₂ diag(φ′(y)) e`. In the mean over the data its
power is `eᵀ M e` with `M = (W₂ᵀW₂) ∘ E[φ′φ′ᵀ]`; errors at neighbouring positions of a convolution are taken as
independent, so that its taps add up. Minimising in this metric in place of the plain one is the closed form of
ALGORITHMS §1 for the weight `M^½ W` (decision 014).
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lowrank.calibration import blaming
from onnx_lowrank.consumers import Reader
from onnx_lowrank.grouping import grouped
from onnx_lowrank.linalg import Array, Metric
from onnx_lowrank.moments import Moments, rows
from onnx_lowrank.runtime import Feed, Session, with_outputs
from onnx_lowrank.sites import Site

_GROUP_BYTES = 512 << 20
_SAMPLES = 16
_PER_CHANNEL = 4  # sampled positions for each channel
_KNOTS = 256
_RIDGE = 0.1  # of the mean importance: some of the plain metric stays, against overfitting to one consumer

Key = tuple[str, str]
"""A site's name and an image of its output."""


def output_metrics(
    model: onnx.ModelProto,
    folder: Path,
    sites: Sequence[tuple[Site, tuple[Reader, ...]]],
    samples: Iterable[Feed],
    *,
    bytes_of: Callable[[Site], int],
    provider: str,
    seed: int,
) -> dict[str, Metric]:
    """The metric of every given site's output.

    Args:
        sites: each with the sites that alone read it, at least one.
        samples: may be gone through several times.
        bytes_of: size of a site's output for one sample; groups stay below 512 MB.

    Raises:
        DataError: an activation that is not finite.
    """
    bent = {(s.name, r.image): s for s, found in sites for r in found if r.image != s.y}
    count = min(sum(1 for _ in samples), _SAMPLES) if bent else 0
    slopes: dict[Key, Moments] = {}
    for group in grouped(bent.items(), lambda item: 2 * bytes_of(item[1]), _GROUP_BYTES):
        slopes |= _slopes(model, folder, dict(group), itertools.islice(samples, count), count, provider, seed)
    return {site.name: metric_of([(r.site, _second(slopes.get((site.name, r.image)))) for r in found])
            for site, found in sites}  # fmt: skip


def _slopes(
    model: onnx.ModelProto,
    folder: Path,
    bent: Mapping[Key, Site],
    samples: Iterable[Feed],
    count: int,
    provider: str,
    seed: int,
) -> dict[Key, Moments]:
    """Moments of φ′ between sites' outputs and their images, from `count` samples."""
    names = list(dict.fromkeys(name for (_, image), s in bent.items() for name in (s.y, image)))
    session = Session(with_outputs(model, names), provider=provider, threads=0, folder=folder)
    found = {key: Moments(site.geometry.outputs, own_precision=True) for key, site in bent.items()}
    rngs = {key: np.random.default_rng([seed, zlib.crc32("\n".join(key).encode())]) for key in bent}
    for sample in samples:
        tensors = dict(zip(names, session.run(sample, names), strict=True))
        for key, site in bent.items():
            wanted = math.ceil(_PER_CHANNEL * site.geometry.outputs / count)
            y, image = (rows(tensors[name], _axis(site)) for name in (site.y, key[1]))
            chosen = rngs[key].choice(len(y), min(wanted, len(y)), replace=False)
            with blaming(site.y):
                found[key].add(slope(y[chosen], image[chosen]))
    return found


def _axis(site: Site) -> int:
    return 1 if site.geometry.op == "Conv" else -1


def _second(slopes: Moments | None) -> Array | float:
    return 1.0 if slopes is None else slopes.second


def slope(y: npt.NDArray[np.floating], image: npt.NDArray[np.floating]) -> Array:
    """φ′ at every y, from values of y and of φ(y): differences between quantiles.

    Args:
        y, image: same shape; image is one scalar function of y.
    """
    order = np.argsort(y, axis=None, kind="stable")
    knots = order[np.linspace(0, y.size - 1, min(_KNOTS, y.size)).astype(np.intp)]
    at, value = y.reshape(-1)[knots].astype(np.float64), image.reshape(-1)[knots].astype(np.float64)
    kept = np.concatenate([[True], np.diff(at) > 0])
    at, value = at[kept], value[kept]
    if len(at) < 2:
        return np.ones(y.shape)
    steps = np.diff(value) / np.diff(at)
    return np.asarray(steps[np.clip(np.searchsorted(at, y) - 1, 0, len(steps) - 1)], np.float64)


def metric_of(consumers: Sequence[tuple[Site, Array | float]]) -> Metric:
    """The metric of an output that these sites read.

    Args:
        consumers: each with `E[φ′φ′ᵀ]` (N×N) of what lies between, 1 where nothing does.
    """
    total = sum(_gram(site) * second for site, second in consumers)
    return Metric.of(np.asarray(total, np.float64), _RIDGE)


def _gram(site: Site) -> Array:
    """`W₂ᵀW₂` over the channels that a site reads, all taps of a kernel together."""
    weight = site.weight.astype(np.float64)
    taps = math.prod(site.geometry.kernel)
    by_channel = weight.reshape(len(weight), -1, taps).transpose(0, 2, 1).reshape(len(weight) * taps, -1)
    return np.asarray(by_channel.T @ by_channel)
