"""Inputs of a model, and the checks that a sample fits them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.errors import DataError
from onnx_lowrank.synthetic import did_you_mean

Array = npt.NDArray[Any]
Sample = Mapping[str, Array]
Head = tuple[np.dtype[Any], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """An input of the model; a str or None in `shape` is a dynamic dim.

    `rows` are those of the smallest table that it chooses rows of, 0 where that is not known.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]
    rows: int = 0

    def __str__(self) -> str:
        """`image (float32, n×3×h×w)`."""
        dims = "×".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name} ({type_name(self.dtype)}, {dims or 'scalar'})"


def check_sample(specs: Sequence[InputSpec], feed: object, where: str) -> dict[str, Array]:
    """The feed as a new dict, after checking names, types, dtypes, shapes and values.

    Raises:
        DataError: the first thing that does not fit the model, with `where`, the input and what to do.
    """
    if not isinstance(feed, Mapping):
        raise DataError(f"{where}: is a {type(feed).__name__}; give a dict of arrays by input name")
    check_names(specs, feed, where)
    for spec in specs:
        value, place = feed[spec.name], f"{where}: input '{spec.name}'"
        if not isinstance(value, np.ndarray | np.generic):
            raise DataError(f"{place} is a {type(value).__name__}; give a numpy array, {spec}")
        check_tensor(spec, (value.dtype, value.shape), place)
        if (value.dtype.kind in "fc" or "float" in value.dtype.name) and not np.isfinite(value).all():
            raise DataError(f"{place} holds NaN or Inf; clean or drop this sample")
    return {s.name: np.asarray(feed[s.name], object if s.dtype.kind in "OUS" else s.dtype) for s in specs}


def check_names(specs: Sequence[InputSpec], names: Iterable[object], where: str) -> None:
    known, names = [spec.name for spec in specs], list(names)
    inputs = ", ".join(map(str, specs))
    for name in names:
        if name not in known:
            near = did_you_mean(str(name), known)
            raise DataError(f"{where}: '{name}' is not an input of the model; its inputs are {inputs}{near}")
    for name in known:
        if name not in names:
            raise DataError(f"{where}: input '{name}' is missing; the model's inputs are {inputs}")


def check_tensor(spec: InputSpec, head: Head, place: str) -> None:
    dtype, shape = head
    if not (dtype.kind in "OU" if spec.dtype.kind in "OUS" else dtype == spec.dtype):
        cast = f".astype({'object' if spec.dtype.kind in 'OUS' else repr(spec.dtype.name)})"
        raise DataError(f"{place} is {type_name(dtype)}, the model takes {spec}; convert it with {cast}")
    same = len(shape) == len(spec.shape)
    if not same or any(isinstance(d, int) and d != n for d, n in zip(spec.shape, shape, strict=True)):
        raise DataError(f"{place} has shape {shape} in one sample, the model takes {spec}; reshape it to fit")


def type_name(dtype: np.dtype[Any]) -> str:
    return "string" if dtype.kind in "OUS" else dtype.name
