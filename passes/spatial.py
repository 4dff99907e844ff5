"""Split a 2-D convolution into a vertical and a horizontal one.

    before   x -[ Conv  N×C×kh×kw, b ]-> y
    after    x -[ Conv  r×C×kh×1 ]- t -[ Conv  N×r×1×kw, b ]-> y

Filters from the weight whitened by the data, then least squares for the second factor (Jaderberg et al. 2014; AIMET's
Spatial SVD has neither). Each axis' stride, dilation and pads go to the factor that owns the axis, the bias to the
second. Exact where every filter is separable or the rank is full, min(C·kh, N·kw). Cost r(C·kh + N·kw)
multiply-adds; where there is a horizontal stride, the first factor also computes columns that the second one skips,
which the measured time includes.
Left alone: 1-D, 3-D and grouped convolutions, kernels with an axis of one.
"""

from __future__ import annotations

from typing import Any

from onnx_lowrank.fragment import Fragment, Kind, Op, Shapes, X, Y, stored
from onnx_lowrank.linalg import Array
from onnx_lowrank.scales import levelled_in_turn
from onnx_lowrank.sites import Geometry


def vertical_then_horizontal(geometry: Geometry, first: Array, second: Array, bias: Array) -> Fragment:
    """`second` N×(r·kw) after `first` r×(C·kh), plus bias N."""
    (kh, kw), rank = geometry.kernel, len(first)
    first, second = levelled_in_turn(first, second)
    constants = {
        "down.weight": stored(first.reshape(rank, geometry.channels, kh, 1), geometry),
        "up.weight": stored(second.reshape(geometry.outputs, rank, 1, kw), geometry),
        "up.bias": stored(bias, geometry),
    }
    return Fragment(
        (
            Op("down", "Conv", (X, "down.weight"), "thin", along(geometry, 0)),
            Op("up", "Conv", ("thin", "up.weight", "up.bias"), Y, along(geometry, 1)),
        ),
        constants,
    )


def along(geometry: Geometry, axis: int) -> dict[str, Any]:
    """Attributes of the factor that owns one spatial axis."""

    def one(values: tuple[int, ...], other: int) -> list[int]:
        return [values[axis] if i == axis else other for i in range(2)]

    found: dict[str, Any] = {
        "kernel_shape": one(geometry.kernel, 1),
        "strides": one(geometry.strides, 1),
        "dilations": one(geometry.dilations, 1),
    }
    if geometry.auto_pad == "NOTSET":
        found["pads"] = [p if i % 2 == axis else 0 for i, p in enumerate(geometry.pads)]
    else:
        found["auto_pad"] = geometry.auto_pad
    return found


def spatial_cost(geometry: Geometry, rank: int) -> int:
    """Multiply-adds per output position, stride one; and numbers stored."""
    kh, kw = geometry.kernel
    return rank * (geometry.channels * kh + geometry.outputs * kw)


def two_axes(geometry: Geometry) -> bool:
    """A 2-D convolution of one group whose kernel is larger than one on both axes."""
    return geometry.op == "Conv" and len(geometry.kernel) == 2 and min(geometry.kernel) > 1 and geometry.groups == 1


def _shapes(geometry: Geometry, rank: int) -> Shapes:
    kh, kw = geometry.kernel
    return (rank, geometry.channels * kh), (geometry.outputs, rank * kw)


def separable_full(geometry: Geometry) -> int:
    """The rank at which a vertical and a horizontal factor are exact."""
    kh, kw = geometry.kernel
    return min(geometry.channels * kh, geometry.outputs * kw)


SPATIAL = Kind(
    name="spatial",
    applies=two_axes,
    cost=spatial_cost,
    build=vertical_then_horizontal,
    split="columns",
    shapes=_shapes,
    full=separable_full,
)
