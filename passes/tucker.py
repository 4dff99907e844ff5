"""Write a convolution as a small one between two changes of channels.

    before   x -[ Conv  N×C×k×k, b ]-> y
    after    x -[ Conv  s×C×1×1 ]- t -[ Conv  r×s×k×k ]- u -[ Conv  N×r×1×1, b ]-> y

Tucker decomposition of the two channel modes (Kim et al. 2015, arXiv 1511.06530; eq. 7 of arXiv 2407.20266). The first
factor is the HOSVD of the weight whitened by the data; with it given, the other two are the closed form of reduced-rank
regression, so that the error at every pair of ranks is known from one factorisation. Strides, pads and dilations go
to the middle one, the bias to the last. Exact at s = C and r = N. Cost Cs + k²sr + rN multiply-adds; where there is a
stride, the first factor also computes positions that the second one skips, which the measured time includes.
Any number of axes. Left alone: 1×1 and grouped convolutions.
"""

from __future__ import annotations

import math

from onnx_lowrank.fragment import Fragment, Kind, Op, Shapes, X, Y, stored
from onnx_lowrank.linalg import Array
from onnx_lowrank.scales import levelled_in_turn
from onnx_lowrank.sites import Geometry


def three_convolutions(
    geometry: Geometry, first: Array, core: Array, last: Array, bias: Array, groups: int = 1
) -> Fragment:
    """`last` N×r after `core` r×(s/g·k²) of g groups after `first` s×C, plus bias N."""
    ones, inner, rank = (1,) * len(geometry.kernel), len(first), len(core)
    first, core, last = levelled_in_turn(first, core, last, groups=groups)
    constants = {
        "down.weight": stored(first.reshape(inner, geometry.channels, *ones), geometry),
        "core.weight": stored(core.reshape(rank, inner // groups, *geometry.kernel), geometry),
        "up.weight": stored(last.reshape(geometry.outputs, rank, *ones), geometry),
        "up.bias": stored(bias, geometry),
    }
    pointwise, grouped = {"kernel_shape": list(ones)}, {"group": groups} if groups > 1 else {}
    return Fragment(
        (
            Op("down", "Conv", (X, "down.weight"), "thin", pointwise),
            Op("core", "Conv", ("thin", "core.weight"), "small", geometry.conv_attributes | grouped),
            Op("up", "Conv", ("small", "up.weight", "up.bias"), Y, pointwise),
        ),
        constants,
    )


def tucker_cost(geometry: Geometry, rank: int, inner: int) -> int:
    """Multiply-adds per output position, stride one; and numbers stored."""
    taps = math.prod(geometry.kernel)
    return geometry.channels * inner + taps * inner * rank + rank * geometry.outputs


def _shapes(geometry: Geometry, rank: int, inner: int) -> Shapes:
    taps = math.prod(geometry.kernel)
    return (inner, geometry.channels), (rank, inner * taps), (geometry.outputs, rank)


TUCKER = Kind(
    name="tucker",
    applies=lambda geometry: geometry.op == "Conv" and not geometry.pointwise and geometry.groups == 1,
    cost=tucker_cost,
    build=three_convolutions,
    split="channels",
    shapes=_shapes,
    full=lambda geometry: geometry.outputs,
    inner_full=lambda geometry: geometry.channels,
)
