"""What 8 bits add to a site's error when it is written as two factors; pure functions on arrays.

Rounding with a step Δ adds Δ²/12 to the variance. Between two factors it reaches the output through the second one,
so a factorisation is as good as its conditioning: pivots with large coefficients amplify, mixed factors do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnx_lowrank.linalg import Array, end_pivots

_PEAK = 6.0  # largest value of an activation, in standard deviations
_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_ACTIVATION, _WEIGHT = 255.0, 127.0  # levels of an unsigned tensor over its range, of a signed weight over half of it


def balanced_scale(second: Array, half: Array, power: Array) -> tuple[Array, float]:
    """Scales of the channels between two factors with the least noise at the output, and that noise.

    With channels divided by s and the second factor's columns multiplied by it, activations are rounded with the step
    of the widest channel, `max(half / s)`, and every row of the second factor with the step of its largest entry. The
    first asks for s as the ranges are, the second for smaller differences: s is a power of the ranges between 0 and 1.

    Args:
        second: N×r×taps.
        half: half the range of each channel, r, above 0.
        power: mean square of each channel, r.
    """
    best = (np.ones_like(half), np.inf)
    for exponent in _EXPONENTS:
        scale = (half / half.max()) ** exponent
        columns = second * scale[None, :, None]
        step = 2 * float((half / scale).max()) / _ACTIVATION
        largest = np.abs(columns).max((1, 2)) / _WEIGHT
        activations = float(np.sum(columns**2)) * step**2 / 12
        weights = float(np.sum(largest**2)) / 12 * second.shape[2] * float(np.sum(power / scale**2))
        if activations + weights < best[1]:
            best = (scale * float((half / scale).max()), activations + weights)
    return best


def mixed_noise(entries: Sequence[int]) -> float:
    """Variance that 8 bits add to a chain of factors, relative to what it computes, with mixed channels between them.

    Mixed channels have one variance and the columns that read them one norm, so that rounding them adds Δ²/12 with Δ
    the range over 255, whatever the spectrum and the rank are. Rows of a mixed factor are as normal numbers: their
    largest entry is √(2 ln n) standard deviations.

    Args:
        entries: of each row of the second factor and of those after it.
    """
    activations = _PEAK**2 / (3 * _ACTIVATION**2)
    return sum(activations + math.log(max(n, 2)) / (6 * _WEIGHT**2) for n in entries)


def pivot_noise(left: Array, values: Array) -> float:
    """The same for outputs written by the first or last r of them (see `passes.pivot`): one scale for all pivots.

    Args:
        left: N×r.
        values: variances of the r uncorrelated channels that it reads.
    """
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
