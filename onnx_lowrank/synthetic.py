"""Made-up inputs for a model without data: smooth noise for images and signals, valid ids for tokens."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.errors import SettingsError

if TYPE_CHECKING:
    from onnx_lowrank.inputs import InputSpec

Array = npt.NDArray[Any]

COUNT = 16
_BATCH, _IMAGE, _CHANNELS, _SEQUENCE = 1, 224, 3, 64
_VOCABULARY = 1000
_SAMPLE_RATE = 16000


def samples(specs: Sequence[InputSpec], sizes: Mapping[str, tuple[int, ...]], seed: int) -> Iterator[dict[str, Array]]:
    """Endless feeds, the same ones for the same seed, one array of `sizes[name]` per input."""
    rng = np.random.default_rng(seed)
    while True:
        yield {spec.name: synthesize(spec, sizes[spec.name], rng) for spec in specs}


def synthesize(spec: InputSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """One plausible array of `shape` for an input, chosen by its dtype, rank, name and the rows of its table."""
    kind = spec.dtype.kind
    if kind in "OUS":
        return np.full(shape, "a", dtype=object)
    if kind == "b":
        return np.ones(shape, dtype=bool)
    if kind in "iu":
        return _integers(spec, shape, rng)
    if "mask" in spec.name.lower() and len(shape) < 4:
        return np.ones(shape, dtype=spec.dtype)
    return _noise(shape, _smooth_axes(spec), rng).astype(spec.dtype)


def resolve_shapes(specs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A complete shape for every input: what `shapes` says, then equal symbols, then defaults by rank and dtype.

    Raises:
        SettingsError: a name that the model lacks; another rank or fixed dim than its own; two sizes for one symbol.
    """
    known = {spec.name: spec for spec in specs}
    bound: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in known:
            raise SettingsError(
                f"--shape {name}: the model has no input '{name}'; its inputs are "
                f"{', '.join(map(str, specs))}{did_you_mean(name, known)}"
            )
        _bind(known[name], shape, bound)
    for spec in specs:  # a batch symbol keeps its size wherever else it stands
        if spec.name not in shapes and spec.shape and isinstance(spec.shape[0], str):
            bound.setdefault(spec.shape[0], _BATCH)
    return {spec.name: tuple(shapes[spec.name]) if spec.name in shapes else _default(spec, bound) for spec in specs}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'image'?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _bind(spec: InputSpec, shape: tuple[int, ...], bound: dict[str, int]) -> None:
    """Check a wished shape against the model's and note the sizes of its symbols."""
    wish = f"--shape {spec.name}:{','.join(map(str, shape))}"
    if len(shape) != len(spec.shape):
        raise SettingsError(f"{wish} has {len(shape)} dims, the model takes {spec}; give {len(spec.shape)}")
    for axis, (size, dim) in enumerate(zip(shape, spec.shape, strict=True)):
        if size < 1:
            raise SettingsError(f"{wish}: axis {axis} is {size}; give sizes of at least 1")
        if isinstance(dim, int) and size != dim:
            raise SettingsError(f"{wish}: axis {axis} is {size}, but fixed in the model, {spec}; give {dim}")
        if isinstance(dim, str) and bound.setdefault(dim, size) != size:
            raise SettingsError(f"{wish}: '{dim}' is {size} here and {bound[dim]} in another --shape; give one size")


def _default(spec: InputSpec, bound: dict[str, int]) -> tuple[int, ...]:
    shape = []
    for axis, dim in enumerate(spec.shape):
        size = dim if isinstance(dim, int) else _default_size(spec, axis)
        shape.append(bound.setdefault(dim, size) if isinstance(dim, str) else size)
    return tuple(shape)


def _default_size(spec: InputSpec, axis: int) -> int:
    dim = spec.shape[axis]
    if axis == 0 or (isinstance(dim, str) and "batch" in dim.lower()):
        return _BATCH
    if not _is_image(spec):
        return _SEQUENCE
    return _IMAGE if axis in _smooth_axes(spec) else _CHANNELS


def _is_image(spec: InputSpec) -> bool:
    return len(spec.shape) == 4 and (spec.dtype.kind not in "iubOUS" or spec.dtype == np.uint8)


def _smooth_axes(spec: InputSpec) -> tuple[int, ...]:
    """Axes along which neighbours resemble each other: H and W of N,C,H,W or N,H,W,C, else the last."""
    if _is_image(spec):
        last = spec.shape[3] in (1, 3, 4) and spec.shape[1] not in (1, 3, 4)
        return (1, 2) if last else (2, 3)
    return (len(spec.shape) - 1,) if spec.shape else ()


def _integers(spec: InputSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    name = spec.name.lower()
    if name == "sr":
        return np.full(shape, min(_SAMPLE_RATE, np.iinfo(spec.dtype).max), dtype=spec.dtype)
    if not shape or "mask" in name:
        return np.ones(shape, dtype=spec.dtype)
    if "type" in name or "segment" in name:
        return np.zeros(shape, dtype=spec.dtype)
    if "position" in name:
        return np.array(np.broadcast_to(np.arange(shape[-1]) % (spec.rows or shape[-1]), shape), dtype=spec.dtype)
    if _is_image(spec):
        return np.asarray(np.clip(128 + 48 * _noise(shape, _smooth_axes(spec), rng), 0, 255), dtype=spec.dtype)
    top = min(spec.rows or _VOCABULARY, _VOCABULARY, int(np.iinfo(spec.dtype).max) + 1)
    return rng.integers(0, max(top, 1), size=shape).astype(spec.dtype)


def _noise(shape: tuple[int, ...], axes: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Noise whose amplitude falls as 1/f along `axes`, of mean 0 and variance 1; a scalar is 1."""
    if not shape:
        return np.ones(())
    white = rng.standard_normal(shape)
    if not white.size:
        return white
    grids = np.meshgrid(*(np.fft.fftfreq(shape[axis]) for axis in axes), indexing="ij")
    radius = np.sqrt(sum(np.square(grid) for grid in grids))
    if not radius.any():  # one value along every smooth axis
        return white
    radius[(0,) * len(axes)] = radius[radius > 0].min()
    gain = np.ones(len(shape), dtype=int)
    gain[list(axes)] = radius.shape
    smooth = np.fft.ifftn(np.fft.fftn(white, axes=axes) / radius.reshape(gain), axes=axes).real
    return np.asarray((smooth - smooth.mean()) / smooth.std())
