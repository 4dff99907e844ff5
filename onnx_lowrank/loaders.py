"""Samples from user code: `loader.py:function`, iterables of dicts, ONNX Runtime's CalibrationDataReader."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lowrank.errors import DataError
from onnx_lowrank.inputs import Array, InputSpec, check_sample
from onnx_lowrank.scratch import Folder
from onnx_lowrank.synthetic import did_you_mean


def stream(
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


def feeds(made: Any, where: str) -> Iterable[object]:
    """What a loader returned, as feeds: an iterable of dicts, or ONNX Runtime's CalibrationDataReader."""
    if hasattr(made, "get_next"):
        return iter(made.get_next, None)
    if isinstance(made, Iterable) and not isinstance(made, Mapping | str | np.ndarray):
        return made
    kind = type(made).__name__
    raise DataError(f"{where}: is a {kind}; give dicts of arrays, one per sample (a list, generator, or get_next())")


class Spool(Folder):
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


def function(file: Path, name: str) -> Callable[[], object]:
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
