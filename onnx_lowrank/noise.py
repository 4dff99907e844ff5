"""What 8 bits add to a site's error when it is written as two factors; pure functions on arrays.

Rounding with a step Δ adds Δ²/12 to the variance. Between two factors it reaches the output through the second one,
so a factorisation is as good as its conditioning: pivots with large coefficients amplify, balanced factors do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from onnx_lowrank.linalg import Array, end_pivots

_PEAK = 6.0  # largest value of an activation, in standard deviations
_ACTIVATION, _WEIGHT = 255.0, 127.0  # levels of an unsigned tensor over its range, of a signed weight over half of it


def factor_noise(left: Array, values: Array) -> float:
    """Variance that 8 bits add to `left t` with channels of t balanced, relative to its own variance.

    Args:
        left: N×r.
        values: variances of the r uncorrelated channels of t.
    """
    power = float(np.sum(left**2 @ values))
    if power <= 0:
        return 0.0
    spread = np.sqrt(np.maximum(values, values.max(initial=0.0) * 1e-8))
    balanced = left * spread * _PEAK  # weight of the second factor: every channel of t then has a range of ±1
    activations = float(np.sum(balanced**2)) * (2 / _ACTIVATION) ** 2 / 12
    weights = float(np.sum((np.abs(balanced).max(1) / _WEIGHT) ** 2)) / 12 * len(values) / _PEAK**2
    return float((activations + weights) / power)


def pivot_noise(left: Array, values: Array) -> float:
    """The same for outputs written by the first or last r of them (see `passes.pivot`): one scale for all pivots."""
    variance = left**2 @ values
    power = float(variance.sum())
    if power <= 0:
        return 0.0
    pivots, _, coefficients = end_pivots(left)
    step = 2 * _PEAK * np.sqrt(float(variance[pivots].max())) / _ACTIVATION
    activations = float(np.sum(coefficients**2)) * step**2 / 12
    largest = np.abs(coefficients).max(1, initial=0.0)
    weights = float(np.sum((largest / _WEIGHT) ** 2)) / 12 * float(variance[pivots].sum())
    return float((activations + weights) / power)


ADDED_NOISE: Final[dict[str, Callable[[Array, Array], float]]] = {
    "svd": factor_noise,
    "conv_svd": factor_noise,
    "pivot": pivot_noise,
}
"""By kind: relative variance that 8 bits add to the site's output, from its left factor and its spectrum."""
