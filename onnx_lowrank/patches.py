"""Patches of a convolution's input: sampled output positions, unfolded, and their second moments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.linalg import Array
from onnx_lowrank.sites import Geometry

PER_DIMENSION = 3
"""Sampled positions for each entry of a patch, over all samples."""

_CHUNK = 2048


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


def sampled(x: npt.NDArray[Any], geometry: Geometry, count: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    """Patches at random output positions of a 2-D convolution.

    Args:
        x: B×C×H×W.
        count: at most so many; all positions when there are fewer.

    Returns:
        positions × (C·kh·kw), in the order of the weight.
    """
    pads = padding(geometry, x.shape[2:])
    padded = np.pad(x, ((0, 0), (0, 0), *pads))
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.strides, geometry.dilations
    rows = (padded.shape[2] - (kh - 1) * dh - 1) // sh + 1
    columns = (padded.shape[3] - (kw - 1) * dw - 1) // sw + 1
    total = len(x) * rows * columns
    chosen = np.sort(rng.choice(total, min(count, total), replace=False))
    batch, rest = np.divmod(chosen, rows * columns)
    top, left = np.divmod(rest, columns)
    down = (top * sh)[:, None, None] + (np.arange(kh) * dh)[None, :, None]
    right = (left * sw)[:, None, None] + (np.arange(kw) * dw)[None, None, :]
    found = padded[batch[:, None, None], :, down, right]  # positions × kh × kw × C
    return np.ascontiguousarray(found.transpose(0, 3, 1, 2)).reshape(len(chosen), -1)


class PatchMoments:
    """Count, mean and second moment of patches; products in the patches' own precision, sums in float64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._sum = np.zeros(width)
        self._products = np.zeros((width, width))

    def add(self, patches: npt.NDArray[Any]) -> None:
        """Accumulate patches (P×width).

        Raises:
            ValueError: an entry is NaN or infinite, or its square is.
        """
        wide = patches if patches.dtype in (np.float32, np.float64) else patches.astype(np.float32)
        for start in range(0, len(wide), _CHUNK):
            chunk = wide[start : start + _CHUNK]
            with np.errstate(over="ignore", invalid="ignore"):
                products = chunk.T @ chunk
            if not np.isfinite(np.trace(products)):
                raise ValueError("its values are not finite")
            self.count += len(chunk)
            self._sum += chunk.sum(axis=0, dtype=np.float64)
            self._products += products

    @property
    def mean(self) -> Array:
        """E[x], width."""
        return self._sum / max(self.count, 1)

    @property
    def covariance(self) -> Array:
        """E[xxᵀ] − E[x]E[x]ᵀ, width×width."""
        return self._products / max(self.count, 1) - np.outer(self.mean, self.mean)
