"""One affine map of single positions, written in the operator that the site had. Shared by the kinds.

x -[ MatMul w ]-[ Add b ]-> y      MatMul (constant on the right, or on the left without bias), a batch as the site
x -[ Gemm w, b ]-> y               Gemm
x -[ Conv 1×1 w, b ]-> y           Conv, of as many groups as the site
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from ml_dtypes import finfo

from onnx_lowrank.fragment import Op, dtype_of, stored
from onnx_lowrank.linalg import Array
from onnx_lowrank.sites import Geometry

AMPLIFIED = 2e-3
"""Most that outputs written by pivots may be amplified: an error of about 1e-5 of the output's power."""

Part = tuple[tuple[Op, ...], dict[str, npt.NDArray[Any]]]


def affine(geometry: Geometry, name: str, x: str, y: str, weight: Array, bias: Array | None, *, first: bool) -> Part:
    """Ops and constants that compute `weight @ x + bias` from local tensor `x` to `y`.

    Args:
        weight: n×k.
        bias: n, or None.
        first: whether `x` is the site's own input (strides, transA), not the output of a factor.
    """
    if geometry.op == "Conv":
        return _conv(geometry, name, x, y, weight, bias, first=first)
    if geometry.op == "Gemm":
        return _gemm(geometry, name, x, y, weight, bias, first=first)
    return _matmul(geometry, name, x, y, weight, bias, first=first)


def joined(geometry: Geometry, name: str, parts: tuple[str, str], y: str, bias: Array) -> Part:
    """Ops that put two parts of a site's outputs side by side; a MatMul has its Add here, where it is fused."""
    rank = len(geometry.x_shape) or 2
    axis = 1 if geometry.op == "Conv" else max(rank - (2 if geometry.side == "left" else 1), 0)
    if geometry.op != "MatMul" or not geometry.bias:
        return (Op(name, "Concat", parts, y, {"axis": axis}),), {}
    both, b = f"{name}.joined", f"{name}.bias"
    concat = Op(name, "Concat", parts, both, {"axis": axis})
    return (concat, Op(f"{name}_bias", "Add", (both, b), y)), {b: stored(bias, geometry)}


def amplification(geometry: Geometry, coefficients: Array) -> float:
    """Largest coefficient times the machine epsilon of the stored type."""
    epsilon = float(finfo(dtype_of(geometry)).eps)  # type: ignore[no-untyped-call]
    return float(np.abs(coefficients).max(initial=0.0)) * epsilon


def _matmul(geometry: Geometry, name: str, x: str, y: str, weight: Array, bias: Array | None, *, first: bool) -> Part:
    w, b = f"{name}.weight", f"{name}.bias"
    left = geometry.side == "left"
    constants = {w: stored(_in_batch(geometry, weight if left else _turned(geometry, weight), first=first), geometry)}
    operands = (w, x) if left else (x, w)
    if bias is None or not geometry.bias:
        return (Op(name, "MatMul", operands, y),), constants
    constants[b] = stored(bias, geometry)
    product = f"{name}.product"
    return (Op(name, "MatMul", operands, product), Op(f"{name}_bias", "Add", (product, b), y)), constants


def _turned(geometry: Geometry, weight: Array) -> Array:
    """The matrices of all groups, each transposed: g×k×(n/g), or k×n for one."""
    if geometry.groups == 1:
        return weight.T
    return weight.reshape(geometry.groups, -1, weight.shape[1]).swapaxes(1, 2)


def _in_batch(geometry: Geometry, matrix: Array, *, first: bool) -> Array:
    """A constant of as many axes as the site's, where the shape of the output depends on them.

    Leading ones of the first factor may give the output its axes; else they would only keep it from being packed.
    """
    ones = geometry.groups == 1 and (not first or len(geometry.x_shape) >= len(geometry.batch) + 2)
    return matrix if ones else matrix.reshape(*geometry.batch, *matrix.shape[-2:])


def _gemm(geometry: Geometry, name: str, x: str, y: str, weight: Array, bias: Array | None, *, first: bool) -> Part:
    w, b = f"{name}.weight", f"{name}.bias"
    constants = {w: stored(weight.T, geometry)}
    attributes = {"transA": 1} if first and geometry.trans_a else {}
    if bias is None and not attributes:
        return (Op(name, "MatMul", (x, w), y),), constants
    # Before opset 11 Gemm needs its third input.
    constants[b] = stored(np.zeros(1) if bias is None else bias, geometry)
    return (Op(name, "Gemm", (x, w, b), y, attributes),), constants


def _conv(geometry: Geometry, name: str, x: str, y: str, weight: Array, bias: Array | None, *, first: bool) -> Part:
    w, b = f"{name}.weight", f"{name}.bias"
    ones = [1] * len(geometry.kernel)
    kernel = geometry.kernel if first else tuple(ones)
    shape = (weight.shape[0], weight.shape[1] // math.prod(kernel), *kernel)
    constants = {w: stored(weight.reshape(shape), geometry)}
    grouped = {"group": geometry.groups} if geometry.groups > 1 else {}
    attributes = geometry.conv_attributes if first else {"kernel_shape": ones, **grouped}
    if bias is None:
        return (Op(name, "Conv", (x, w), y, attributes),), constants
    constants[b] = stored(bias, geometry)
    return (Op(name, "Conv", (x, w, b), y, attributes),), constants
