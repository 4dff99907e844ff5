"""Samples in .npz and .npy files, memory-mapped: one array per input, first axis = samples."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from onnx_lowrank.errors import DataError
from onnx_lowrank.inputs import Array, Head, InputSpec, check_names, check_sample, check_tensor
from onnx_lowrank.scratch import Folder


@dataclasses.dataclass(frozen=True)
class Table:
    """Arrays with the samples along their first axis; `read` maps them from disk."""

    specs: Sequence[InputSpec]
    where: str
    steps: dict[str, int]
    count: int
    read: Callable[[], dict[str, Array]]

    def __iter__(self) -> Iterator[dict[str, Array]]:
        arrays = self.read()
        for i in range(self.count):
            feed = {
                name: np.array(array[i * step : (i + 1) * step] if (step := self.steps[name]) else array[i])
                for name, array in arrays.items()
            }
            yield check_sample(self.specs, feed, f"{self.where}, sample {i}")


def _checked_table(
    specs: Sequence[InputSpec], where: str, heads: Mapping[str, Head], read: Callable[[], dict[str, Array]]
) -> Table:
    check_names(specs, heads, where)
    found = {spec.name: _steps(spec, heads[spec.name], f"{where}: input '{spec.name}'") for spec in specs}
    counts = {name: count for name, (_, count) in found.items()}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"{where}: different numbers of samples ({text}); give every input the same number")
    count = next(iter(counts.values()), 0)
    if not count:
        raise DataError(f"{where}: no samples; give at least one")
    return Table(specs, where, {name: step for name, (step, _) in found.items()}, count, read)


def _steps(spec: InputSpec, head: Head, place: str) -> tuple[int, int]:
    """Rows of one sample (0: x[i] is a whole input) and the number of samples."""
    dtype, shape = head
    rank = len(spec.shape)
    if len(shape) == rank + 1:
        check_tensor(spec, (dtype, shape[1:]), place)
        return 0, shape[0]
    if len(shape) != rank or not rank:
        raise DataError(f"{place} has {len(shape)} axes, the model takes {spec}; give {rank + 1}, samples first")
    batch = spec.shape[0]
    step = batch if isinstance(batch, int) and batch > 1 else 1
    if shape[0] % step:
        raise DataError(f"{place} has {shape[0]} rows, the model takes {step} at a time, {spec}; give a multiple")
    check_tensor(spec, (dtype, (step, *shape[1:])), place)
    return step, shape[0] // step


def file_table(specs: Sequence[InputSpec], path: Path, folder: Folder) -> Table:
    if path.suffix == ".npz":
        return _npz(specs, path, folder)
    if len(specs) != 1:
        inputs = ", ".join(map(str, specs))
        raise DataError(f"{path}: which input is it? The model's are {inputs}; give input:{path.name} for each")
    return npy_table(specs, str(path), {specs[0].name: path})


def npy_table(specs: Sequence[InputSpec], where: str, files: dict[str, Path]) -> Table:
    def read() -> dict[str, Array]:
        return {name: _mapped(path, path) for name, path in files.items()}

    heads = {}
    for name, path in files.items():
        with _reading(path), path.open("rb") as stream:
            heads[name] = _head(stream, f"{path}: input '{name}'")
        if 0 not in heads[name][1]:
            _mapped(path, path)
    return _checked_table(specs, where, heads, read)


def _npz(specs: Sequence[InputSpec], path: Path, folder: Folder) -> Table:
    heads = {}
    with _reading(path), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            with archive.open(member) as stream:
                heads[name] = _head(stream, f"{path}: input '{name}'")
    extracted: dict[str, Path] = {}

    def read() -> dict[str, Array]:
        if not extracted:
            extracted.update(_extract(path, list(heads), Path(tempfile.mkdtemp(dir=folder.path))))
        return {name: _mapped(file, path) for name, file in extracted.items()}

    return _checked_table(specs, str(path), heads, read)


def _extract(path: Path, names: list[str], folder: Path) -> dict[str, Path]:
    files = {name: folder / f"{i}.npy" for i, name in enumerate(names)}
    with _reading(path), zipfile.ZipFile(path) as archive:
        for name, file in files.items():
            with archive.open(f"{name}.npy") as stream, file.open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 16)
    return files


def _mapped(file: Path, path: Path) -> Array:
    with _reading(path):
        return np.load(file, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]


def _head(stream: IO[bytes], place: str) -> Head:
    """Dtype and shape of a .npy stream, without its values."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise DataError(f"{place} is a pickled object array, which is never loaded; save it with a plain dtype")
    return dtype, shape


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, RuntimeError) as fault:
        text = " ".join(str(fault).split())
        raise DataError(f"{path}: cannot be read, damaged or not numpy's ({text}); save it again") from None
