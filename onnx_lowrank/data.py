"""Samples for a model, streamed from files, loaders or Python, and checked against its inputs on the way."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import shutil
import sys
import tempfile
import traceback
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank import synthetic
from onnx_lowrank.errors import DataError, SettingsError
from onnx_lowrank.synthetic import did_you_mean

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


def check_sample(specs: Sequence[InputSpec], feed: object, where: str) -> dict[str, Array]:
    """The feed as a new dict, after checking names, types, dtypes, shapes and values.

    Raises:
        DataError: the first thing that does not fit the model, with `where`, the input and what to do.
    """
    if not isinstance(feed, Mapping):
        raise DataError(f"{where}: is a {type(feed).__name__}; give a dict of arrays by input name")
    _check_names(specs, feed, where)
    for spec in specs:
        value, place = feed[spec.name], f"{where}: input '{spec.name}'"
        if not isinstance(value, np.ndarray | np.generic):
            raise DataError(f"{place} is a {type(value).__name__}; give a numpy array, {spec}")
        _check_tensor(spec, (value.dtype, value.shape), place)
        if (value.dtype.kind in "fc" or "float" in value.dtype.name) and not np.isfinite(value).all():
            raise DataError(f"{place} holds NaN or Inf; clean or drop this sample")
    return {s.name: np.asarray(feed[s.name], object if s.dtype.kind in "OUS" else s.dtype) for s in specs}


def _check_names(specs: Sequence[InputSpec], names: Iterable[object], where: str) -> None:
    known, names = [spec.name for spec in specs], list(names)
    inputs = ", ".join(map(str, specs))
    for name in names:
        if name not in known:
            near = did_you_mean(str(name), known)
            raise DataError(f"{where}: '{name}' is not an input of the model; its inputs are {inputs}{near}")
    for name in known:
        if name not in names:
            raise DataError(f"{where}: input '{name}' is missing; the model's inputs are {inputs}")


def _check_tensor(spec: InputSpec, head: Head, place: str) -> None:
    dtype, shape = head
    if not (dtype.kind in "OU" if spec.dtype.kind in "OUS" else dtype == spec.dtype):
        cast = f".astype({'object' if spec.dtype.kind in 'OUS' else repr(spec.dtype.name)})"
        raise DataError(f"{place} is {_type_name(dtype)}, the model takes {spec}; convert it with {cast}")
    same = len(shape) == len(spec.shape)
    if not same or any(isinstance(d, int) and d != n for d, n in zip(spec.shape, shape, strict=True)):
        raise DataError(f"{place} has shape {shape} in one sample, the model takes {spec}; reshape it to fit")


def _type_name(dtype: np.dtype[Any]) -> str:
    return "string" if dtype.kind in "OUS" else dtype.name


def _stream(
    specs: Sequence[InputSpec], where: str, begin: Callable[[], Iterable[object]], limit: int, file: str = ""
) -> Iterator[dict[str, Array]]:
    """Checked samples of user code; what it raises becomes a DataError with the line in `file`."""
    feeds, index = None, 0
    while index < limit:
        try:
            feeds = iter(begin()) if feeds is None else feeds
            feed = next(feeds)
        except StopIteration:
            break
        except DataError:
            raise
        except (Exception, SystemExit) as fault:
            raise _user_fault(fault, where, file) from fault
        yield check_sample(specs, feed, f"{where}, sample {index}")
        index += 1
    if not index:
        raise DataError(f"{where}: no samples; give at least one, and start anew each time it is read")


def _user_fault(fault: BaseException, where: str, file: str) -> DataError:
    frames = traceback.extract_tb(fault.__traceback__)
    frame = next((f for f in reversed(frames) if not file or Path(f.filename) == Path(file).absolute()), None)
    if isinstance(fault, SyntaxError) and fault.filename:
        place = f"{fault.filename}:{fault.lineno}"
    else:
        place = f"{frame.filename}:{frame.lineno}" if frame else where
    text = " ".join(str(fault).split())
    return DataError(f"{place}: {type(fault).__name__}: {text}; fix it, or run it alone to see its traceback")


def _feeds(made: Any, where: str) -> Iterable[object]:
    """What a loader returned, as feeds: an iterable of dicts, or ONNX Runtime's CalibrationDataReader."""
    if hasattr(made, "get_next"):
        return iter(made.get_next, None)
    if isinstance(made, Iterable) and not isinstance(made, Mapping | str | np.ndarray):
        return made
    kind = type(made).__name__
    raise DataError(f"{where}: is a {kind}; give dicts of arrays, one per sample (a list, generator, or get_next())")


def _open_python(specs: Sequence[InputSpec], data: Any, limit: int) -> Source:
    where = "data"
    if callable(data) and not isinstance(data, Iterable) and not hasattr(data, "get_next"):
        return Source(where, False, lambda: _stream(specs, where, lambda: _feeds(data(), where), limit))
    feeds = _feeds(data, where)
    if not isinstance(feeds, Iterator):
        return Source(where, False, lambda: _stream(specs, where, lambda: feeds, limit))
    spool = _Spool(specs, _stream(specs, where, lambda: feeds, limit))
    return Source(where, False, spool.samples, spool.close)


class _Folder:
    """A temporary folder that goes with its owner."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="onnx-lowrank-"))
        self.close = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class _Spool(_Folder):
    """A stream that can be read once, kept on disk as far as it was read."""

    def __init__(self, specs: Sequence[InputSpec], stream: Iterator[dict[str, Array]]) -> None:
        super().__init__()
        self._specs, self._stream, self._count = specs, stream, 0
        self._fault: DataError | None = None

    def samples(self) -> Iterator[dict[str, Array]]:
        for index in itertools.count():
            if index == self._count and not self._pull():
                return
            with np.load(self.path / f"{index}.npz", allow_pickle=False) as arrays:
                values = [arrays[f"arr_{i}"] for i in range(len(self._specs))]
            yield {s.name: _restored(v, s.dtype) for s, v in zip(self._specs, values, strict=True)}

    def _pull(self) -> bool:
        if self._fault is not None:
            raise self._fault
        try:
            feed = next(self._stream, None)
        except DataError as fault:
            self._fault = fault
            raise
        if feed is not None:
            values = (v.astype(str) if v.dtype.kind == "O" else v for v in feed.values())
            np.savez(self.path / f"{self._count}.npz", *values)
            self._count += 1
        return feed is not None


def _restored(value: Array, dtype: np.dtype[Any]) -> Array:
    """The array with its dtype, which the file format loses for strings and for ml_dtypes."""
    return value.view(dtype) if value.dtype.kind == "V" else value.astype(object if dtype.kind in "OUS" else dtype)


def _open_paths(specs: Sequence[InputSpec], texts: list[str], limit: int) -> Source:
    description = ", ".join(texts)
    loader = next((t for t in texts if not Path(t).exists() and t.rpartition(":")[0].endswith(".py")), None)
    if loader is not None:
        if len(texts) > 1:
            raise DataError(f"{description}: '{loader}' gives whole samples; give it alone")
        file, _, name = loader.rpartition(":")
        function = _function(Path(file), name)
        begin = lambda: _stream(specs, loader, lambda: _feeds(function(), loader), limit, file)  # noqa: E731
        return Source(description, False, begin)
    named = {text: name for text in texts for name in [_input_of(specs, text)] if name}
    if named and (len(named) < len(texts) or len(set(named.values())) < len(named)):
        raise DataError(f"{description}: give every input once as input:file.npy, or whole samples, not a mix")
    folder = _Folder()
    if named:
        files = {name: Path(text[len(name) + 1 :]) for text, name in named.items()}
        tables = [_npy(specs, description, files)]
    else:
        tables = [_table(specs, file, folder) for text in texts for file in _files(Path(text))]
    if not any(table.count for table in tables):
        raise DataError(f"{description}: no samples; give at least one")
    rows = lambda: itertools.islice(itertools.chain.from_iterable(map(iter, tables)), limit)  # noqa: E731
    return Source(description, False, rows, folder.close)


def _input_of(specs: Sequence[InputSpec], text: str) -> str:
    """The input that `input:file.npy` names, '' for a plain path."""
    if Path(text).exists() or ":" not in text:
        return ""
    names = [spec.name for spec in specs if text.startswith(f"{spec.name}:")]
    name = max(names, key=len, default="") or text.rpartition(":")[0]
    known = [spec.name for spec in specs]
    if name not in known:
        inputs = ", ".join(map(str, specs))
        near = did_you_mean(name, known)
        raise DataError(f"{text}: '{name}' is not an input of the model; its inputs are {inputs}{near}")
    return name


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give x.npz, a folder, input:file.npy or loader.py:function")
    if not path.is_dir():
        if path.suffix not in (".npz", ".npy"):
            raise DataError(f"{path}: unsupported file type '{path.suffix}'; give .npz, .npy or loader.py:function")
        return [path]
    found = sorted(f for f in path.iterdir() if f.suffix in (".npz", ".npy") and not f.name.startswith("."))
    if len({f.suffix for f in found}) != 1:
        what = "holds both .npz and .npy files" if found else "holds no .npz and no .npy files"
        raise DataError(f"{path}: the folder {what}; give a folder of one kind")
    return found


def _function(file: Path, name: str) -> Callable[[], object]:
    """A function of a user's Python file; its folder can be imported from while the file is executed."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; give loader.py:function")
    module_name = f"_onnx_lowrank_loader_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as fault:
        raise _user_fault(fault, str(file), str(file)) from fault
    finally:
        sys.path.remove(str(file.resolve().parent))
    function = getattr(module, name, None)
    if not callable(function):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise DataError(
            f"{file}: has no function '{name}'; it has {', '.join(known) or 'none'}{did_you_mean(name, known)}"
        )
    return function  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class _Table:
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
) -> _Table:
    _check_names(specs, heads, where)
    found = {spec.name: _steps(spec, heads[spec.name], f"{where}: input '{spec.name}'") for spec in specs}
    counts = {name: count for name, (_, count) in found.items()}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"{where}: different numbers of samples ({text}); give every input the same number")
    count = next(iter(counts.values()), 0)
    if not count:
        raise DataError(f"{where}: no samples; give at least one")
    return _Table(specs, where, {name: step for name, (step, _) in found.items()}, count, read)


def _steps(spec: InputSpec, head: Head, place: str) -> tuple[int, int]:
    """Rows of one sample (0: x[i] is a whole input) and the number of samples."""
    dtype, shape = head
    rank = len(spec.shape)
    if len(shape) == rank + 1:
        _check_tensor(spec, (dtype, shape[1:]), place)
        return 0, shape[0]
    if len(shape) != rank or not rank:
        raise DataError(f"{place} has {len(shape)} axes, the model takes {spec}; give {rank + 1}, samples first")
    batch = spec.shape[0]
    step = batch if isinstance(batch, int) and batch > 1 else 1
    if shape[0] % step:
        raise DataError(f"{place} has {shape[0]} rows, the model takes {step} at a time, {spec}; give a multiple")
    _check_tensor(spec, (dtype, (step, *shape[1:])), place)
    return step, shape[0] // step


def _table(specs: Sequence[InputSpec], path: Path, folder: _Folder) -> _Table:
    if path.suffix == ".npz":
        return _npz(specs, path, folder)
    if len(specs) != 1:
        inputs = ", ".join(map(str, specs))
        raise DataError(f"{path}: which input is it? The model's are {inputs}; give input:{path.name} for each")
    return _npy(specs, str(path), {specs[0].name: path})


def _npy(specs: Sequence[InputSpec], where: str, files: dict[str, Path]) -> _Table:
    def read() -> dict[str, Array]:
        return {name: _mapped(path, path) for name, path in files.items()}

    heads = {}
    for name, path in files.items():
        with _reading(path), path.open("rb") as stream:
            heads[name] = _head(stream, f"{path}: input '{name}'")
        if 0 not in heads[name][1]:
            _mapped(path, path)
    return _checked_table(specs, where, heads, read)


def _npz(specs: Sequence[InputSpec], path: Path, folder: _Folder) -> _Table:
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
