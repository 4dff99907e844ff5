"""Fit the last factor to what a ReLU lets through (Zhang et al. 2015, arXiv 1505.06798, section 3.2).

Where `max(y, 0)` alone is read, errors of y below zero do not matter as long as they stay there. Auxiliary values z
take the place of the target: `min ‖max(y,0) − max(z,0)‖² + λ ‖z − ŷ‖²` has a solution for every element, and the last
factor is then regressed on z, in turn, while λ grows.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from onnx_lowrank.linalg import Array

_PENALTIES = (*(0.01,) * 8, *(0.1,) * 3, 1.0)
_RELAXED = 1.7  # times the step of a regression: the part that a ReLU hides goes along only slowly
_RIDGE = 1e-4  # of the mean variance of a feature
_EVERY = 5  # one vector in so many decides which step is kept


def auxiliary(wanted: Array, predicted: Array, penalty: float) -> Array:
    """z for every element: the better of the two solutions, below and above zero.

    Args:
        wanted: max(y, 0).
        predicted: ŷ.
        penalty: λ.
    """
    below = np.minimum(predicted, 0)
    above = np.maximum((penalty * predicted + wanted) / (penalty + 1), 0)
    loss_below = wanted**2 + penalty * (below - predicted) ** 2
    loss_above = (above - wanted) ** 2 + penalty * (above - predicted) ** 2
    return np.where(loss_below < loss_above, below, above)


def rectified(features: Array, target: Array, last: Array, bias: Array) -> tuple[Array, Array]:
    """Last factor (N×m) and bias (N) that fit `max(target, 0)`; the given ones where no step is better.

    Vectors that do not take part in the regression decide. Elementwise steps and products are of the vectors' own
    precision, the regression of double precision.

    Args:
        features: P×m, what the last factor reads.
        target: P×N, before the ReLU.
    """
    test = np.arange(len(features)) % _EVERY == 0
    seen, wanted = features[~test], np.maximum(target[~test], 0)
    unseen, judged = features[test], np.maximum(target[test], 0)
    if len(seen) <= 2 * features.shape[1]:
        return last, bias
    mean = seen.mean(axis=0, dtype=np.float64)
    centred = seen - mean.astype(seen.dtype)
    gram = (centred.T @ centred).astype(np.float64) / len(seen)
    spread = float(np.trace(gram)) / len(gram)
    if not spread > 0:
        return last, bias
    solver = scipy.linalg.cho_factor(gram + _RIDGE * spread * np.eye(len(gram)))
    regressed = scipy.linalg.cho_solve(solver, centred.T / len(seen)).astype(seen.dtype)  # m×P, the same for every step

    def predicted(features: Array, last: Array, bias: Array) -> Array:
        found = features @ last.T.astype(features.dtype)
        found += bias.astype(features.dtype)
        return np.asarray(found)

    def loss(last: Array, bias: Array) -> float:
        error = np.maximum(predicted(unseen, last, bias), 0) - judged
        return float(np.vdot(error, error))

    best, least = (last, bias), loss(last, bias)
    for penalty in _PENALTIES:
        here = predicted(seen, last, bias)
        z = auxiliary(wanted, here, penalty)
        last = last + _RELAXED * (regressed @ (z - here)).T  # centred: no bias in it
        bias = z.mean(axis=0, dtype=np.float64) - last @ mean
        now = loss(last, bias)
        if now < least:
            best, least = (last, bias), now
    return best
