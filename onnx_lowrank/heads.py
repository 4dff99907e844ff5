"""Which errors of queries, keys and values matter: what attention makes of them (decision 018).

Scores are `q·k`, and a softmax turns an error of them into its deviation from its mean under the weights p. So an error
e of a query matters by `eᵀ Cov_p(k) e`, that of a key by `(eᵀq)²` times `p(1 − p)`. An error of a value reaches the
site that reads the heads, W: what all positions have in common passes whole, through `WᵀW`; what differs from position
to position is averaged by the weights, each head on its own, and keeps the share `Σ p²`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import scipy.linalg

from onnx_lowrank.attention import Attention
from onnx_lowrank.grouping import grouped
from onnx_lowrank.linalg import Array, Metric
from onnx_lowrank.runtime import Feed, Session, with_outputs

_GROUP_BYTES = 256 << 20
_SAMPLES = 32
_RIDGE = 0.1  # of the mean importance: some of the plain metric stays
_COMMON = 0.5  # share of an error of the values that all positions have in common, in units of the mean of Σ p²
_CLOSE = 1e-3  # of the largest entry

Found = dict[str, Array]
"""Sums over the positions: `query` and `key` H×d×d, `spread` H."""


def attention_metrics(
    model: onnx.ModelProto,
    folder: Path,
    found: Sequence[Attention],
    samples: Iterable[Feed],
    *,
    bytes_of: Callable[[str], int],
    provider: str,
) -> dict[str, Metric]:
    """The metrics of the outputs of sites for queries, keys and values, by name.

    A site whose channels are not the heads side by side has none.

    Args:
        samples: may be gone through several times.
        bytes_of: size of a tensor for one sample; groups stay below 256 MB.
    """
    metrics: dict[str, Metric] = {}
    for group in grouped(found, lambda one: sum(bytes_of(name) for name in one.tensors), _GROUP_BYTES):
        names = list(dict.fromkeys(name for one in group for name in one.tensors))
        session = Session(with_outputs(model, names), provider=provider, threads=0, folder=folder)
        sums: list[Found] = [{} for _ in group]
        for sample in itertools.islice(samples, _SAMPLES):
            tensors = dict(zip(names, session.run(sample, names), strict=True))
            for one, total in zip(group, sums, strict=True):
                for key, value in moments(one, tensors).items():
                    total[key] = total[key] + value if key in total else value
        for one, total in zip(group, sums, strict=True):
            metrics |= metrics_of(one, total)
    return metrics


def moments(one: Attention, tensors: Mapping[str, npt.NDArray[np.floating]]) -> Found:
    """What one run says about the sites of an attention; nothing about a site whose channels are not heads."""
    queries, keys, values, p = (tensors[n] for n in (one.queries, one.keys, one.values, one.weights))
    if not queries.ndim == keys.ndim == values.ndim == p.ndim == 4 or p.shape[-2:] != (queries.shape[2], keys.shape[3]):
        return {}
    found: Found = {}
    across = keys.swapaxes(-1, -2)  # B×H×T×d
    if one.query is not None and side_by_side(tensors[one.query.y], queries):
        mean = p @ across
        second = _gram(across, p.sum(axis=2))
        found["query"] = second - _gram(mean, np.ones(mean.shape[:3], mean.dtype))
    if one.key is not None and side_by_side(tensors[one.key.y], across):
        found["key"] = _gram(queries, (p * (1 - p)).sum(axis=3))
    if one.value is not None and side_by_side(tensors[one.value.y], values):
        found["spread"] = np.asarray((p**2).sum(axis=(0, 2, 3)), np.float64)
        found["count"] = np.asarray(p.shape[0] * p.shape[2], np.float64)
    return found


def _gram(x: npt.NDArray[np.floating], weights: npt.NDArray[np.floating]) -> Array:
    """Weighted second moment of every head, H×d×d, of B×H×T×d."""
    by_head = (x * weights[..., None]).swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[3])
    plain = x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[3])
    return np.asarray(by_head.swapaxes(1, 2) @ plain, np.float64)


def side_by_side(y: npt.NDArray[np.floating], heads: npt.NDArray[np.floating]) -> bool:
    """Whether y (…×T×(H·d)) is heads (B×H×T×d) one beside the other, up to one factor."""
    batch, count, length, width = heads.shape
    if y.size != heads.size or y.shape[-1] != count * width:
        return False
    moved = y.reshape(batch, length, count, width).swapaxes(1, 2)
    power = float(np.vdot(moved, moved))
    if not 0 < power < np.inf:
        return False
    factor = float(np.vdot(moved, heads)) / power
    return bool(np.abs(heads - factor * moved).max() <= _CLOSE * np.abs(heads).max())


def metrics_of(one: Attention, found: Mapping[str, Array]) -> dict[str, Metric]:
    """Metrics from sums over all samples."""
    metrics = {}
    for name, site in (("query", one.query), ("key", one.key)):
        if site is not None and name in found:
            metrics[site.name] = Metric.of(scipy.linalg.block_diag(*found[name]), _RIDGE)
    if one.value is not None and one.reader is not None and "spread" in found:
        spread = found["spread"] / float(found["count"])
        weight = one.reader.weight.astype(np.float64)
        gram = weight.T @ weight
        count, width = len(spread), len(gram) // len(spread)
        if one.value.geometry.outputs == len(gram) == count * width:
            own = np.kron(np.diag(spread), np.ones((width, width)))
            metrics[one.value.name] = Metric.of(gram * (own + _COMMON * float(spread.mean())), _RIDGE)
    return metrics
