"""Patches of a convolution's input: sampled output positions, unfolded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.linalg import Index
from onnx_lowrank.sites import Geometry

_PER_DIMENSION, _MANY_PER_DIMENSION = 3, 12


def padding(geometry: Geometry, spatial: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each spatial axis of an input of that size; `auto_pad` resolved as ONNX defines it."""
    axes = len(geometry.kernel)
    if geometry.auto_pad == "NOTSET":
        return tuple((geometry.pads[i], geometry.pads[axes + i]) for i in range(axes))
    if geometry.auto_pad == "VALID":
        return ((0, 0),) * axes
    found = []
    for size, k, stride, dilation in zip(spatial, geometry.kernel, geometry.strides, geometry.dilations, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small = total // 2
        found.append((small, total - small) if geometry.auto_pad == "SAME_UPPER" else (total - small, small))
    return tuple(found)


def enough(geometry: Geometry, samples: int, *, many: bool = False) -> int:
    """Positions to take of each of so many samples: three in all for each entry of a patch.

    Args:
        many: twelve, where an error is told by second moments without any correction for few patches.
    """
    return max(math.ceil((_MANY_PER_DIMENSION if many else _PER_DIMENSION) * geometry.inputs / samples), 16)


def sampled(x: npt.NDArray[Any], geometry: Geometry, count: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    """Patches at random output positions of a convolution: positions × (C·kernel), in the order of the weight.

    Args:
        x: B×C×spatial axes.
        count: at most so many; all positions when there are fewer.
    """
    return unfolded(x, geometry, positions(x.shape, geometry, count, rng))


def positions(shape: tuple[int, ...], geometry: Geometry, count: int, rng: np.random.Generator) -> Index:
    """Random output positions (batch, one for each spatial axis) of a convolution of such an input, ascending."""
    sizes = output_sizes(shape, geometry)
    total = math.prod(sizes)
    chosen = np.sort(rng.choice(total, min(count, total), replace=False))
    return np.stack(np.unravel_index(chosen, sizes), axis=1)


def output_sizes(shape: tuple[int, ...], geometry: Geometry) -> tuple[int, ...]:
    """Batch and size of each spatial axis of what a convolution makes of such an input."""
    padded = [size + sum(pad) for size, pad in zip(shape[2:], padding(geometry, shape[2:]), strict=True)]
    axes = zip(padded, geometry.kernel, geometry.strides, geometry.dilations, strict=True)
    return shape[0], *((size - (k - 1) * d - 1) // s + 1 for size, k, s, d in axes)


def unfolded(x: npt.NDArray[Any], geometry: Geometry, where: Index) -> npt.NDArray[Any]:
    """Patches of x (B×C×spatial axes) at output positions `where`: positions × (C·kernel)."""
    padded = np.pad(x, ((0, 0), (0, 0), *padding(geometry, x.shape[2:])))
    axes = len(geometry.kernel)
    batch, *corners = where.T
    taps = zip(corners, geometry.kernel, geometry.strides, geometry.dilations, strict=True)
    index = []
    for axis, (corner, k, stride, dilation) in enumerate(taps):
        along = (corner * stride)[:, None] + np.arange(k) * dilation
        index.append(along.reshape(-1, *(k if i == axis else 1 for i in range(axes))))
    found = padded[(batch.reshape(-1, *(1,) * axes), slice(None), *index)]  # positions × kernel × C
    return np.ascontiguousarray(np.moveaxis(found, -1, 1)).reshape(len(where), -1)
