"""Finished stages of a run in a folder, so that a run that was cut off goes on from the last one.

A stage is one `.npz` file: its arrays, and a JSON text that says how they make up values. Only None, numbers, text,
arrays, lists, tuples and dicts of them, and this package's own dataclasses and enums go in and come out; nothing is
unpickled. The name holds a hash of all that the stage depends on, so that another model, other data or other
settings find nothing; a damaged file counts as none.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import importlib
import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from onnx_lowrank.errors import SettingsError
from onnx_lowrank.saving import write_bytes

T = TypeVar("T")
_SCHEMA: Final = 3  # counts up when a stage comes to mean something else
_TEXT: Final = "structure"


class Stages:
    """The finished stages of one run.

    Args:
        folder: where they are kept; None keeps nothing.
        key: a hash of the model, the data and the settings.

    Raises:
        SettingsError: the folder is a file, or cannot be made.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self.folder, self.key = folder, key
        self.found: list[str] = []
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as fault:
                raise SettingsError(f"--resume {folder}: cannot be used ({fault.strerror}); give a folder") from None

    def recall(self, name: str, make: Callable[[], T]) -> T:
        """The value of a stage: from its file, else made now and kept.

        Raises:
            SettingsError: it cannot be written.
        """
        if self.folder is None:
            return make()
        path = self.folder / f"{name}-{self.key[:16]}.npz"
        known = _read(path)
        if known is not None:
            self.found.append(name)
            return known[0]  # type: ignore[no-any-return]
        content = packed(make())
        write_bytes(path, content)
        return unpacked(io.BytesIO(content))  # type: ignore[no-any-return]  # arrays laid out as after a resumption


def run_key(model: str, settings: Any, samples: Iterable[Mapping[str, npt.NDArray[Any]]], versions: str) -> str:
    """A hash of the model's hash, all settings but folders, a given table, all samples and what computes."""
    digest = hashlib.sha256(f"{_SCHEMA} {model} {versions}".encode())
    fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    text = {name: str(value) for name, value in fields.items() if name not in ("resume", "cache", "provenance")}
    digest.update(json.dumps(text, sort_keys=True).encode())
    own_metric = Path(settings.metric.rpartition(":")[0])
    for file in (own_metric, settings.cache):
        if file.is_file():
            digest.update(file.read_bytes())
    for sample in samples:
        for name, array in sorted(sample.items()):
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            plain = array.dtype.kind not in "OUS"
            digest.update(np.ascontiguousarray(array).tobytes() if plain else repr(array.tolist()).encode())
    return digest.hexdigest()


def packed(value: Any) -> bytes:
    """The bytes of a stage's file.

    Raises:
        TypeError: a value of a kind that is not kept.
    """
    arrays: list[npt.NDArray[Any]] = []
    text = json.dumps({"schema": _SCHEMA, "value": _plain(value, arrays)})
    stream = io.BytesIO()
    named: dict[str, Any] = {f"a{i}": a for i, a in enumerate(arrays)}
    np.savez(stream, **{**named, _TEXT: np.frombuffer(text.encode(), np.uint8)})
    return stream.getvalue()


def unpacked(content: Any) -> Any:
    """The value of a stage's file, given by path or as a stream.

    Raises:
        ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile: not such a file.
    """
    with np.load(content, allow_pickle=False) as stored:
        table = json.loads(stored[_TEXT].tobytes())
        if table["schema"] != _SCHEMA:
            raise ValueError("a stage of another version")
        return _value(table["value"], stored)


def _read(path: Path) -> tuple[Any] | None:
    try:
        return (unpacked(path),)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, ImportError, zipfile.BadZipFile):
        return None


def _plain(value: Any, arrays: list[npt.NDArray[Any]]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub":
            raise TypeError(f"arrays of {value.dtype} are not kept")
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, enum.Enum):
        return {"enum": _name(type(value)), "member": value.name}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_plain(v, arrays) for v in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_plain(k, arrays), _plain(v, arrays)] for k, v in value.items()]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name), arrays) for f in dataclasses.fields(value)}
        return {"class": _name(type(value)), "fields": fields}
    raise TypeError(f"a {type(value).__name__} is not kept")


def _value(plain: Any, arrays: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    if "array" in plain:
        return arrays[f"a{plain['array']}"]
    if "enum" in plain:
        return _named(plain["enum"], enum.Enum)[plain["member"]]
    if "dict" in plain:
        return {_value(k, arrays): _value(v, arrays) for k, v in plain["dict"]}
    if "class" in plain:
        made = _named(plain["class"], object)
        if not hasattr(made, "__dataclass_fields__"):
            raise ValueError(f"{plain['class']} is no dataclass")
        return made(**{name: _value(v, arrays) for name, v in plain["fields"].items()})
    many = plain["list"] if "list" in plain else plain["tuple"]
    values = [_value(v, arrays) for v in many]
    return values if "list" in plain else tuple(values)


def _name(kind: type) -> str:
    if not kind.__module__.startswith(f"{__package__}."):
        raise TypeError(f"a {kind.__name__} is not kept")
    return f"{kind.__module__}:{kind.__qualname__}"


def _named(name: str, base: type) -> Any:
    module, _, kind = name.partition(":")
    if not module.startswith(f"{__package__}.") or "." in kind:
        raise ValueError(f"{name} is not of this package")
    found = getattr(sys.modules.get(module) or importlib.import_module(module), kind)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{name} is not what it was")
    return found
