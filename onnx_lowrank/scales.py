"""Factors whose thin channels have one scale: no narrow type over- or underflows, nor what passes between them."""

from __future__ import annotations

import numpy as np

from onnx_lowrank.linalg import Array

_SHARE = 0.25  # of the mean row's norm


def levelled(first: Array, second: Array, outputs: int) -> tuple[Array, Array]:
    """Rows of a first factor brought to one norm, and what reads them scaled back; their product stays.

    The norm is a quarter of that of the mean row of the map that the two compute (as if its terms were orthogonal): a
    thin channel is then about a quarter as large as an output, for it may peak higher, and an entry of the first factor
    no larger than rows of the map are. A fitted factor may be far from that: filters of whitened patches grow where a
    channel hardly varies, and a unit direction of N outputs gives √N of what one of them does. Scales are powers of
    two, so that nothing is rounded.

    Args:
        first: m×a, a row for each thin channel.
        second: m×b, what reads each of them.
        outputs: rows of the map.
    """
    rows, read = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
    wanted = _SHARE * np.linalg.norm(rows * read) / np.sqrt(outputs)
    ratio = np.divide(wanted, rows, where=(rows > 0) & (wanted > 0), out=np.ones_like(rows))
    scale = np.exp2(np.rint(np.log2(ratio)))[:, None]
    return first * scale, second / scale


def levelled_in_turn(*factors: Array, groups: int = 1) -> tuple[Array, ...]:
    """Factors that are applied one after the other, each pair `levelled`.

    Args:
        factors: each has a row for each channel that it makes, and columns (channels × taps) for those that it reads.
        groups: of the second one; its rows read the channels of their own group.
    """
    found = list(factors)
    # A row of a group sees few channels: their scales show only once the first pair has been brought to one.
    turns = 2 if groups > 1 else 1
    for index in [*reversed(range(len(found) - 1))] * turns:
        first, second = found[index], found[index + 1]
        parts = groups if index == 0 else 1
        read = second.reshape(parts, len(second) // parts, len(first) // parts, -1).swapaxes(1, 2)
        found[index], scaled = levelled(first, read.reshape(len(first), -1), len(second))
        found[index + 1] = scaled.reshape(read.shape).swapaxes(1, 2).reshape(second.shape)
    return tuple(found)
