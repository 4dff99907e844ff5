"""Write a 2-D convolution as a vertical, a horizontal and a 1×1 one.

    before   x -[ Conv  N×C×kh×kw, b ]-> y
    after    x -[ Conv  s×C×kh×1 ]- t -[ Conv  r×s×1×kw ]- u -[ Conv  N×r×1×1, b ]-> y

`spatial`, and then the closed form of low rank on its output (Zhang et al. 2015, arXiv 1505.06798, asymmetric 3d
decomposition; here the second step is reduced-rank regression on the original's output). Each axis' stride, dilation
and pads go to the factor that owns the axis, the bias to the last. Exact at s = min(C·kh, N·kw) and r = N. Cost
Ckh·s + kw·s·r + rN multiply-adds.
Left alone: 1-D, 3-D and grouped convolutions, kernels with an axis of one.
"""

from __future__ import annotations

from onnx_lowrank.fragment import Fragment, Kind, Op, Shapes, X, Y, stored
from onnx_lowrank.linalg import Array
from onnx_lowrank.passes.spatial import along, separable_full, two_axes
from onnx_lowrank.scales import levelled_in_turn
from onnx_lowrank.sites import Geometry


def vertical_horizontal_pointwise(geometry: Geometry, first: Array, core: Array, last: Array, bias: Array) -> Fragment:
    """`last` N×r after `core` r×(s·kw) after `first` s×(C·kh), plus bias N."""
    (kh, kw), inner, rank = geometry.kernel, len(first), len(core)
    first, core, last = levelled_in_turn(first, core, last)
    constants = {
        "down.weight": stored(first.reshape(inner, geometry.channels, kh, 1), geometry),
        "core.weight": stored(core.reshape(rank, inner, 1, kw), geometry),
        "up.weight": stored(last.reshape(geometry.outputs, rank, 1, 1), geometry),
        "up.bias": stored(bias, geometry),
    }
    return Fragment(
        (
            Op("down", "Conv", (X, "down.weight"), "thin", along(geometry, 0)),
            Op("core", "Conv", ("thin", "core.weight"), "small", along(geometry, 1)),
            Op("up", "Conv", ("small", "up.weight", "up.bias"), Y, {"kernel_shape": [1, 1]}),
        ),
        constants,
    )


def asym3d_cost(geometry: Geometry, rank: int, inner: int) -> int:
    """Multiply-adds per output position, stride one; and numbers stored."""
    kh, kw = geometry.kernel
    return geometry.channels * kh * inner + kw * inner * rank + rank * geometry.outputs


def _shapes(geometry: Geometry, rank: int, inner: int) -> Shapes:
    kh, kw = geometry.kernel
    return (inner, geometry.channels * kh), (rank, inner * kw), (geometry.outputs, rank)


ASYM3D = Kind(
    name="asym3d",
    applies=two_axes,
    cost=asym3d_cost,
    build=vertical_horizontal_pointwise,
    split="columns",
    shapes=_shapes,
    full=lambda geometry: geometry.outputs,
    inner_full=separable_full,
)
