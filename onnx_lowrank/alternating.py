"""Alternating least squares for nested factors, in the metric of the data (ALGORITHMS §2).

`y ≈ B (A ⊗ I_w) x` is linear in A for a given B and in B for a given A. B has the closed form of `separable`; A,
r×(K/w) unknowns that all depend on each other, is moved by a few steps of preconditioned conjugate gradients, each
of which costs one product of A with the covariance of the patches.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import scipy.linalg

from onnx_lowrank.linalg import Array

Square = npt.NDArray[np.floating]
"""A covariance as (K/w)×w×(K/w)×w."""

_RIDGE = 1e-7  # of the mean variance of the thin features
_SMOOTH = 1e-4  # of the mean eigenvalue: ridge of the preconditioner


def alternated(
    weight: Array, covariance: Array, first: Array, width: int, rank: int = 0, *, sweeps: int = 2, steps: int = 4
) -> Array:
    """A better first factor of the same rank, r×(K/w); the error with the best second factor never rises.

    The given one where it has more filters than the data have directions: in single precision the features of filters
    that see next to nothing are noise.

    Args:
        weight: W, N×K.
        covariance: S of the patches, K×K.
        first: A, r×(K/w), to start from.
        width: w.
        rank: of the second factor; 0 when it has full rank.
        sweeps: how often both factors are improved.
        steps: of conjugate gradients in each of them.
    """
    thin, columns = first.shape
    square = covariance.reshape(columns, width, columns, width).astype(np.float32)
    target = (weight @ covariance).reshape(len(weight), columns, width)
    for _ in range(sweeps):
        try:
            second = best_second(first, square, target, rank)
        except scipy.linalg.LinAlgError:
            break
        gram = (second.T @ second).reshape(thin, width, thin, width)
        by_rank = second.reshape(len(weight), thin, width)
        wanted = np.einsum("rjcj->rc", np.tensordot(by_rank, target, axes=([0], [0])))
        first = descended(first, wanted, gram, square, steps)
    return first


def best_second(first: Array, square: Square, target: Array, rank: int = 0) -> Array:
    """The best second factor, N×(r·w), for a first one: least squares, of low rank where `rank` is not 0.

    Args:
        square: S as (K/w)×w×(K/w)×w.
        target: W S as N×(K/w)×w.

    Raises:
        scipy.linalg.LinAlgError: rounding has left features that are not positive definite.
    """
    features, cross = thin_moments(first, square, target)
    second = np.asarray(scipy.linalg.solve(features, cross, assume_a="pos").T)
    if not 0 < rank < len(second):
        return second
    basis = scipy.linalg.eigh(second @ cross)[1][:, -rank:]
    return np.asarray(basis @ (basis.T @ second))


def thin_moments(first: Array, square: Square, target: Array) -> tuple[Array, Array]:
    """E[zzᵀ] with a small ridge, (r·w)², and E[zyᵀ], (r·w)×N, of thin features; arguments as of `best_second`."""
    thin, width = len(first), square.shape[1]
    half = np.tensordot(first.astype(square.dtype), square, axes=1)
    products = np.tensordot(half, first.astype(square.dtype), axes=([2], [1])).transpose(0, 1, 3, 2)
    features: Array = products.reshape(thin * width, thin * width).astype(np.float64)
    cross = np.tensordot(first, target, axes=([1], [1])).transpose(0, 2, 1).reshape(thin * width, -1)
    ridge = max(_RIDGE * float(np.trace(features)) / len(features), np.finfo(np.float64).tiny)
    features.flat[:: len(features) + 1] += ridge
    return features, cross


def descended(first: Array, wanted: Array, gram: Array, square: Square, steps: int) -> Array:
    """Conjugate gradients on `Σ (BᵀB) A S = wanted`, preconditioned by the means over the columns."""
    thin, width = gram.shape[:2]
    precise = gram.astype(square.dtype)

    def product(a: Array) -> Array:
        spread = np.tensordot(a.astype(square.dtype), square, axes=1)  # r × w × (K/w) × w
        parts = [precise[:, j].reshape(thin, -1) @ spread[..., j].reshape(thin * width, -1) for j in range(width)]
        return np.asarray(sum(parts), np.float64)

    precondition = _preconditioner(np.einsum("ajbj->ab", gram), np.einsum("ajbj->ab", square).astype(np.float64))
    residual = wanted - product(first)
    direction = step = precondition(residual)
    power = float(np.sum(residual * step))
    for _ in range(steps):
        image = product(direction)
        curvature = float(np.sum(direction * image))
        if power <= 0 or curvature <= 0:
            break
        first = first + power / curvature * direction
        residual = residual - power / curvature * image
        step = precondition(residual)
        fresh = float(np.sum(residual * step))
        direction, power = step + fresh / power * direction, fresh
    return first


def _preconditioner(gram: Array, second: Array) -> Callable[[Array], Array]:
    left, right = (
        scipy.linalg.cho_factor(m + max(_SMOOTH * float(np.trace(m)) / len(m), 1e-300) * np.eye(len(m)))
        for m in (gram, second)
    )
    return lambda a: np.asarray(scipy.linalg.cho_solve(right, scipy.linalg.cho_solve(left, a).T).T)
