"""Samples for a model, streamed from files, loaders or Python, and checked against its inputs on the way."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx_lowrank import synthetic
from onnx_lowrank.errors import DataError, SettingsError
from onnx_lowrank.inputs import Array, InputSpec, Sample
from onnx_lowrank.loaders import Spool, feeds, function, stream
from onnx_lowrank.scratch import Folder
from onnx_lowrank.synthetic import did_you_mean
from onnx_lowrank.tables import file_table, npy_table

Data = str | Path | Sequence[str | Path] | Iterable[Sample] | Callable[[], object] | None
_EVERY = 4  # one sample of so many is held out


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


def turn_about(sources: Sequence[Source]) -> Source:
    """The first sample of each source, then the second of each, and so on, as long as all have one."""
    if len(sources) == 1:
        return sources[0]

    def samples() -> Iterator[dict[str, Array]]:
        return itertools.chain.from_iterable(zip(*sources, strict=False))

    return Source(sources[0].description, all(source.synthetic for source in sources), samples)


def split(source: Source) -> tuple[Source, Source, bool]:
    """Calibration samples, held-out samples, and whether they are the same single sample.

    One of each four samples is held out, at a place that is drawn, so that of data that alternates not all of one sort
    are; of two or three the last. Views stream; at most four samples are read here.

    Raises:
        DataError: as iterating the source does.
    """
    count = sum(1 for _ in itertools.islice(source, _EVERY))

    def apart(index: int) -> bool:
        return held_out(index) if count == _EVERY else index == count - 1

    def view(held: bool) -> Source:
        def samples() -> Iterator[dict[str, Array]]:
            return (s for i, s in enumerate(source) if count == 1 or apart(i) == held)

        return Source(source.description, source.synthetic, samples)

    return view(False), view(True), count == 1


def held_out(index: int) -> bool:
    """Whether the sample of that index is held out, of four samples or more: each place once in four fours."""
    four, place = divmod(index, _EVERY)
    places = random.Random(four // _EVERY).sample(range(_EVERY), _EVERY)
    return place == places[four % _EVERY]


def _open_python(specs: Sequence[InputSpec], data: Any, limit: int) -> Source:
    where = "data"
    if callable(data) and not isinstance(data, Iterable) and not hasattr(data, "get_next"):
        return Source(where, False, lambda: stream(specs, where, lambda: feeds(data(), where), limit))
    given = feeds(data, where)
    if not isinstance(given, Iterator):
        return Source(where, False, lambda: stream(specs, where, lambda: given, limit))
    spool = Spool(specs, stream(specs, where, lambda: given, limit))
    return Source(where, False, spool.samples, spool.close)


def _open_paths(specs: Sequence[InputSpec], texts: list[str], limit: int) -> Source:
    description = ", ".join(texts)
    loader = next((t for t in texts if not Path(t).exists() and t.rpartition(":")[0].endswith(".py")), None)
    if loader is not None:
        if len(texts) > 1:
            raise DataError(f"{description}: '{loader}' gives whole samples; give it alone")
        file, _, name = loader.rpartition(":")
        loaded = function(Path(file), name)
        begin = lambda: stream(specs, loader, lambda: feeds(loaded(), loader), limit, file)  # noqa: E731
        return Source(description, False, begin)
    named = {text: name for text in texts for name in [_input_of(specs, text)] if name}
    if named and (len(named) < len(texts) or len(set(named.values())) < len(named)):
        raise DataError(f"{description}: give every input once as input:file.npy, or whole samples, not a mix")
    folder = Folder()
    if named:
        files = {name: Path(text[len(name) + 1 :]) for text, name in named.items()}
        tables = [npy_table(specs, description, files)]
    else:
        tables = [file_table(specs, file, folder) for text in texts for file in _files(Path(text))]
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
