"""The seed's bottleneck merging against `nystrom` on real layers: figures for decision 077.

python tools/bench_bottleneck.py MODEL.onnx SAMPLES.npz

Convolution, ReLU, convolution. The paper (arXiv 2407.20266, layer merging) multiplies the first Tucker factor of the
second convolution into the one before it, across the ReLU: `Uᵀ relu(y)` becomes `relu(Uᵀ y)`. Here U are the leading
directions of relu(y), which is the best that a Tucker factor can be on these data; `nystrom` keeps channels. In both
the second convolution is then regressed on what is left, on the same patches. Printed is the relative error of its
output on samples that were not fitted to.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from onnx_lowrank.chains import Chain, disjoint_chains
from onnx_lowrank.linalg import Array
from onnx_lowrank.narrow import narrowed
from onnx_lowrank.patches import positions, unfolded
from onnx_lowrank.prepare import load
from onnx_lowrank.regression import Joint, JointMoments
from onnx_lowrank.runtime import Session, with_outputs
from onnx_lowrank.settings import Settings

SHARES = (0.9, 0.75, 0.5)
FITTED, TESTED, PATCHES = 12, 4, 400
MOST = 1200  # entries of a patch

Tensors = list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]
"""What the first convolution gives, and the output of the second one, by sample."""


def moments(tensors: Tensors, chain: Chain, hidden: Any) -> Joint:
    """Of patches of a hidden layer, and the outputs of the convolution that reads it."""
    geometry, found = chain.consumer.geometry, None
    for index, (before, after) in enumerate(tensors):
        x = hidden(before)
        where = positions(x.shape, geometry, PATCHES, np.random.default_rng(index))
        batch, *corners = where.T
        patches, targets = unfolded(x, geometry, where), after[(batch, slice(None), *corners)]
        found = found or JointMoments(patches.shape[1], targets.shape[1])
        found.add(patches, targets)
    assert found is not None
    return found.settled(centred=True)


def error(fitted: Joint, tested: Joint, power: float) -> float:
    """Relative error of the best linear map, with its bias, on other samples."""
    regular = fitted.second + 1e-5 * np.trace(fitted.second) / len(fitted.second) * np.eye(len(fitted.second))
    weight = scipy.linalg.solve(regular, fitted.cross.T, assume_a="pos").T
    left = power - 2 * np.sum(weight * tested.cross) + np.sum((weight @ tested.second) * weight)
    bias = fitted.mean_y - weight @ fitted.mean - (tested.mean_y - weight @ tested.mean)
    return max(float((left + bias @ bias) / power), 0.0)


def turned(basis: Array) -> Any:
    """The hidden layer when a factor is multiplied into the convolution before the ReLU."""
    return lambda before: np.maximum(np.einsum("bchw,ck->bkhw", before, basis.astype(before.dtype)), 0)


def rows_of(chain: Chain, tensors: Tensors) -> list[str]:
    """A line for each share of the channels."""
    fit, test = tensors[:FITTED], tensors[FITTED:]
    plain = moments(fit, chain, lambda before: np.maximum(before, 0))
    weight = chain.consumer.weight.astype(np.float64)
    whole = moments(test, chain, lambda before: np.maximum(before, 0))
    power = float(np.sum((weight @ whole.second) * weight))
    channels, taps = chain.producer.geometry.outputs, int(np.prod(chain.consumer.geometry.kernel))
    order = narrowed("", weight, plain.second, plain.mean, taps)
    across = plain.second.reshape(channels, taps, channels, taps)
    basis = scipy.linalg.eigh(np.einsum("atbt->ab", across))[1][:, ::-1]
    lines = []
    for share in SHARES:
        width = round(share * channels)
        kept = order.kept(width)
        found = []
        for hidden in (turned(basis[:, :width]), lambda before, kept=kept: np.maximum(before[:, kept], 0)):
            found.append(error(moments(fit, chain, hidden), moments(test, chain, hidden), power))
        lines.append(f"{chain.consumer.name}: {width} of {channels}: merged {found[0]:.4f}, nystrom {found[1]:.4f}")
    return lines


def main() -> None:
    """Print the lines of all layers that are narrow enough."""
    model, data = Path(sys.argv[1]), sys.argv[2]
    loaded = load(model, data, Settings(samples=FITTED + TESTED), lambda *_: None)
    chains = [c for c in disjoint_chains(loaded.graph, loaded.sites) if [op.op for op in c.ops] == ["Relu"]]
    for chain in (c for c in chains if np.prod(c.consumer.geometry.kernel) > 1 and c.consumer.geometry.inputs <= MOST):
        names = [chain.start, chain.consumer.y]
        session = Session(with_outputs(loaded.file.model, names), threads=0, folder=model.parent)
        tensors = [tuple(session.run(sample, names)) for sample in loaded.source]
        for line in rows_of(chain, tensors):
            print(line, flush=True)


if __name__ == "__main__":
    main()
