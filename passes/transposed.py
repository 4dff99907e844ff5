"""ConvTranspose in two factors. Shared by the kinds; which form it takes is in the site's geometry.

before     x -[ ConvTranspose  C×N×k×k, b ]-> y
scatters   x -[ Conv  r×C×1×1 ]- t -[ ConvTranspose  r×N×k×k, b ]-> y      W is (N·k²)×C, a map of single positions
overlaps   x -[ ConvTranspose  C×r×k×k ]- t -[ Conv  N×r×1×1, b ]-> y      W is N×(C·k²), the Gram form on the output

Where taps do not overlap (dilated kernel ≤ stride, no pads), every output comes from one input position, and the error
of the outputs is that of the map C→N·k² on the input's second moment. Where they overlap the terms of several positions
add up, and only factors on the output's side have a closed form (decision 070).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from onnx_lowrank.fragment import Fragment, Op, X, Y, stored
from onnx_lowrank.linalg import Array
from onnx_lowrank.passes.fold import Folded
from onnx_lowrank.sites import Geometry


def is_disjoint(geometry: Geometry) -> bool:
    """Whether no output of a ConvTranspose comes from two positions, and none of what is computed is cut off."""
    axes = zip(geometry.kernel, geometry.strides, geometry.dilations, strict=True)
    return all((k - 1) * d < s for k, s, d in axes) and not any(geometry.pads) and geometry.auto_pad == "NOTSET"


def scattering(geometry: Geometry, folded: Folded) -> tuple[Geometry, Folded]:
    """A ConvTranspose as the map of single positions C → N·taps, its bias once for each tap."""
    taps = math.prod(geometry.kernel)
    weight = folded.weight.reshape(geometry.outputs, -1, taps).swapaxes(1, 2).reshape(geometry.outputs * taps, -1)
    bias = None if folded.bias is None else np.repeat(folded.bias, taps)
    geometry = dataclasses.replace(geometry, outputs=weight.shape[0], inputs=weight.shape[1])
    return geometry, dataclasses.replace(folded, weight=weight, bias=bias)


def transposed_whole(geometry: Geometry, weight: Array, bias: Array) -> Fragment:
    """The ConvTranspose itself: weight (N·k²)×C or N×(C·k²), bias N·k² or N."""
    constants = {"dense.weight": stored(_kernel(geometry, weight), geometry)}
    constants["dense.bias"] = stored(_of_channels(geometry, bias), geometry)
    op = Op("dense", "ConvTranspose", (X, "dense.weight", "dense.bias"), Y, geometry.conv_attributes)
    return Fragment((op,), constants)


def transposed_factors(geometry: Geometry, left: Array, right: Array, bias: Array) -> Fragment:
    """`left (right x) + bias`: left (N·k²)×r and right r×C where taps do not overlap, else N×r and r×(C·k²)."""
    ones = [1] * len(geometry.kernel)
    mixing, thin = {"kernel_shape": ones}, geometry.conv_attributes
    if geometry.scatters:
        down, up = right.reshape(*right.shape, *ones), _kernel(geometry, left)
        forms = (("Conv", mixing), ("ConvTranspose", thin))
    else:
        down, up = _kernel(geometry, right), left.reshape(*left.shape, *ones)
        forms = (("ConvTranspose", thin), ("Conv", mixing))
    constants = {
        "down.weight": stored(down, geometry),
        "up.weight": stored(up, geometry),
        "up.bias": stored(_of_channels(geometry, bias), geometry),
    }
    return Fragment(
        (
            Op("down", forms[0][0], (X, "down.weight"), "thin", forms[0][1]),
            Op("up", forms[1][0], ("thin", "up.weight", "up.bias"), Y, forms[1][1]),
        ),
        constants,
    )


def transposed_cost(geometry: Geometry, rank: int) -> int:
    """Multiply-adds per input position; a 1×1 Conv behind the ConvTranspose works at all positions of the output."""
    outputs = geometry.outputs if geometry.scatters else geometry.outputs * math.prod(geometry.strides)
    return rank * (geometry.inputs + outputs)


def _kernel(geometry: Geometry, weight: Array) -> Array:
    """A weight as ConvTranspose stores it, inputs × outputs × kernel."""
    taps = math.prod(geometry.kernel)
    if geometry.scatters:  # (outputs·taps) × inputs
        return weight.T.reshape(weight.shape[1], -1, *geometry.kernel)
    return weight.reshape(len(weight), -1, taps).swapaxes(0, 1).reshape(-1, len(weight), *geometry.kernel)


def _of_channels(geometry: Geometry, bias: Array) -> Array:
    return bias.reshape(-1, math.prod(geometry.kernel))[:, 0] if geometry.scatters else bias
