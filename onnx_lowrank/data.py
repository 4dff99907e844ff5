"""Samples for a model, streamed from files, loaders or Python, and checked against its inputs on the way."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank import synthetic
from onnx_lowrank.errors import SettingsError

Array = npt.NDArray[Any]
Sample = Mapping[str, Array]
"""One complete feed for the model, by input name."""

Data = str | Path | Sequence[str | Path] | Iterable[Sample] | Callable[[], object] | None
Head = tuple[np.dtype[Any], tuple[int, ...]]
_EVERY = 4  # one sample in four is held out


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """An input of the model; a str or None in `shape` is a dynamic dim."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        """`image (float32, n×3×h×w)`."""
        dims = "×".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name} ({_type_name(self.dtype)}, {dims or 'scalar'})"


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Samples that can be iterated any number of times: always the same ones, in the same order, one at a time.

    Iterating raises DataError at the first sample that does not fit the model, and when there is none.
    """

    description: str
    synthetic: bool
    samples: Callable[[], Iterator[dict[str, Array]]]
    close: Callable[[], object] = lambda: None
    """Removes temporary files now instead of with the last reference; the source cannot be iterated afterwards."""

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return self.samples()


def open_source(
    specs: Sequence[InputSpec],
    data: Data,
    *,
    limit: int = 256,
    seed: int = 0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Source:
    """Samples for a model with these inputs. Names, dtypes, shapes and counts of files are checked here.

    Args:
        specs: the model's inputs.
        data: paths (`x.npz`, `x.npy`, `input:x.npy`, a folder of either, `loader.py:function`), an iterable of dicts
            or a function that returns one, or None for synthetic inputs.
        limit: at most so many samples.
        seed: of synthetic inputs.
        shapes: shapes of synthetic inputs by name.

    Raises:
        DataError: data that is missing, damaged, or does not fit the model.
        SettingsError: `shapes` that do not fit the model, or given along with real data.
    """
    if data is None:
        sizes, count = synthetic.resolve_shapes(specs, shapes or {}), min(synthetic.COUNT, limit)
        begin = lambda: itertools.islice(synthetic.samples(specs, sizes, seed), count)  # noqa: E731
        return Source(f"synthetic inputs (seed {seed})", True, begin)
    if shapes:
        raise SettingsError("--shape only shapes synthetic inputs; drop it, the data has its own shapes")
    if isinstance(data, str | Path):
        data = [data]
    if isinstance(data, list | tuple) and data and all(isinstance(part, str | Path) for part in data):
        return _open_paths(specs, [str(part) for part in data], limit)
    return _open_python(specs, data, limit)


def split(source: Source) -> tuple[Source, Source, bool]:
    """Calibration samples, held-out samples, and whether they are the same single sample.

    Every fourth sample is held out; of two or three the last. Views stream; at most four samples are read here.

    Raises:
        DataError: as iterating the source does.
    """
    count = sum(1 for _ in itertools.islice(source, _EVERY))
    last = min(count, _EVERY) - 1

    def view(held: bool) -> Source:
        def samples() -> Iterator[dict[str, Array]]:
            return (s for i, s in enumerate(source) if count == 1 or (i % _EVERY == last) == held)

        return Source(source.description, source.synthetic, samples)

    return view(False), view(True), count == 1
