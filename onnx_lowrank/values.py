"""Large arrays that may be mapped from files: read in blocks, and let go of afterwards."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

_BLOCK = 4 << 20  # entries


def all_finite(array: npt.NDArray[Any]) -> bool:
    """Whether no entry is NaN or infinite. Pages of a mapped file that this reads are given back."""
    try:
        return all(bool(np.isfinite(_plain(block)).all()) for block in _blocks(array))
    finally:
        release(array)


def same_values(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Whether two arrays have the same shape, type and finite entries."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    try:
        return all(np.array_equal(a, b) for a, b in zip(_blocks(one), _blocks(other), strict=True))
    finally:
        release(one)
        release(other)


def release(array: npt.NDArray[Any]) -> None:
    """Give back the memory of a mapped file; its entries are read again when they are asked for."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
        with contextlib.suppress(OSError, ValueError):
            base.madvise(mmap.MADV_DONTNEED)


def _blocks(array: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Views of an array that together hold every entry once."""
    if array.ndim == 0 or array.size <= _BLOCK:
        return [array]
    rows = max(1, _BLOCK * len(array) // array.size)
    return [array[start : start + rows] for start in range(0, len(array), rows)]


def _plain(block: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return block if block.dtype.kind == "f" else block.astype(np.float32)  # ml_dtypes
