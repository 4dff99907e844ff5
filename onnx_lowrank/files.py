"""Model files: read without their external data, written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import onnx
from google.protobuf.message import DecodeError, EncodeError, Message  # type: ignore[import-untyped, unused-ignore]

from onnx_lowrank.errors import ModelError, SettingsError
from onnx_lowrank.protos import Opened
from onnx_lowrank.saving import Part, read_chunks, write_files
from onnx_lowrank.tensors import (
    data_files,
    is_external,
    is_large,
    make_tensor,
    raw_chunks,
    read_tensor,
    size_of,
    tensors_of,
)
from onnx_lowrank.unknown import copy_unknown
from onnx_lowrank.wellformed import check_text

__all__ = [
    "ModelFile", "check_copy", "copy_model", "data_of", "make_tensor", "read_model", "read_tensor", "same", "taken",
    "write_model",
]  # fmt: skip

_LIMIT: Final = 2**31 - 1  # protobuf's
_ALIGNMENT: Final = 4096
_PAYLOAD: Final = frozenset(
    ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data", "external_data")
)


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A model as it lies on disk. Hash and size count the model file and its data files.

    `opened` are the fused nodes that are plain ones in `model`; `data` are the data files by location, as they are on
    disk, whatever became of `model`.
    """

    path: Path
    model: onnx.ModelProto
    sha256: str
    bytes: int
    external: bool
    opened: tuple[Opened, ...] = ()
    data: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder that external data is relative to."""
        return self.path.parent


def read_model(path: Path) -> ModelFile:
    """Read a model; external data is checked and hashed, not loaded.

    Raises:
        ModelError: the file is missing, not an ONNX model or not readable, or its external data is not as it says.
    """
    try:
        content = _content(path)
        model = _parse(content, path)
        check_text(model, str(path))
        files = data_files(model, path.parent)
        digest = hashlib.sha256(content)
        size = len(content) + sum(file.stat().st_size for file in files.values())
        for chunk in (chunk for file in files.values() for chunk in read_chunks(file)):
            digest.update(chunk)
    except OSError as fault:
        where = fault.filename or path
        raise ModelError(f"'{where}' cannot be read: {fault.strerror or fault}; check its permissions") from None
    return ModelFile(path, model, digest.hexdigest(), size, bool(files), data=files)


def data_of(path: Path) -> dict[str, Path]:
    """The data files of a model by location; they are not read.

    Raises:
        ModelError: as `read_model`.
    """
    try:
        return data_files(_parse(_content(path), path), path.parent)
    except OSError as fault:
        raise ModelError(f"'{path}' cannot be read: {fault.strerror or fault}; check its permissions") from None


def write_model(model: onnx.ModelProto, out: Path, *, folder: Path, external: bool) -> int:
    """Write `model`, all of it or nothing, and return the bytes written. `model` is not changed.

    With `external`, or beyond protobuf's 2 GB, large tensors are streamed to one data file `OUT.1a2b3c4d.data`, whose
    name has a hash of its content: other data never takes the place of what a model reads.

    Args:
        folder: where the external data that `model` refers to lies now.

    Raises:
        SettingsError: the disk is full or not writable, or `out` is a data file of the source model.
        ModelError: a tensor's data is not as it says, or the model exceeds 2 GB without its weights.
    """
    sources = data_files(model, folder)
    _keep_sources(out, sources)
    if not external and sum(size_of(tensor) or 0 for tensor in tensors_of(model)) < _LIMIT:
        content = _serialize(_inlined(model, folder) if sources else model)
        if content is not None:
            return write_files([Part(out, [content], len(content))])
    skeleton, moved, end, location = _skeleton(model, out.name, folder)
    content = _serialize(skeleton)
    if content is None:
        raise ModelError(f"'{out}' would exceed 2 GB without its weights; move large tensors out of subgraphs")
    parts = [Part(out.with_name(location), _padded(moved, folder), end)] if moved else []
    return write_files([*parts, Part(out, [content], len(content))])


def copy_model(source: ModelFile, out: Path) -> int:
    """Copy a model byte for byte, with its data files where `out` is in another folder; return the bytes written.

    Nothing happens, and 0 is returned, when `out` is the source itself. A data file that is there already stays.

    Raises:
        SettingsError: the disk is full or not writable, a name is `taken`, or as `check_copy`.
    """
    check_copy(source, out)
    if same(out, source.path):
        return 0
    if (other := taken(source, out)) is not None:
        raise SettingsError(f"'{other}' is there with other content; choose an output in another folder")
    pairs = [pair for pair in _copies(source, out) if not pair[1].exists()] + [(source.path, out)]
    return write_files([Part(target, read_chunks(file), file.stat().st_size) for file, target in pairs])


def check_copy(source: ModelFile, out: Path) -> None:
    """Refuse an output that would cost this model the weights.

    Raises:
        SettingsError: `out` is one of the source's data files or has the name that a copy needs for one.
        ModelError: the source's data files are no longer there.
    """
    if same(out, source.path):
        return
    _keep_sources(out, source.data)
    for file, target in _copies(source, out):
        if not file.is_file():
            raise ModelError(f"data file '{file}' is no longer there; get it again")
        if same(target, out):
            raise SettingsError(f"output '{out}' has the name of the model's data file; choose another name")


def taken(source: ModelFile, out: Path) -> Path | None:
    """What lies, with other content, where a copy of the model would read its data; None where nothing does."""
    return next(
        (there for file, there in _copies(source, out) if os.path.lexists(there) and not _alike(file, there)), None
    )


def _alike(file: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(file, other, shallow=False)


def _copies(source: ModelFile, out: Path) -> list[tuple[Path, Path]]:
    """The source's data files, and where a copy of it reads them."""
    if same(out.parent, source.folder):
        return []
    pairs = [(file, out.parent / location) for location, file in source.data.items()]
    return [pair for pair in pairs if not same(*pair)]


def _content(path: Path) -> bytes:
    if path.is_dir():
        raise ModelError(f"'{path}' is a folder; name the .onnx file in it")
    if not path.is_file():
        raise ModelError(f"'{path}' {'is not a regular file' if path.exists() else 'does not exist'}; check the path")
    if not (size := path.stat().st_size):
        raise ModelError(f"'{path}' is empty; get the model again")
    if size > _LIMIT:
        raise ModelError(f"'{path}' exceeds protobuf's 2 GB; save the model with external data")
    return path.read_bytes()


def _parse(content: bytes, path: Path) -> onnx.ModelProto:
    if content.startswith(b"version https://git-lfs"):
        raise ModelError(f"'{path}' is a Git LFS pointer, not the model; run `git lfs pull`")
    model = onnx.ModelProto()
    with contextlib.suppress(DecodeError):
        model.ParseFromString(content)
        if model.HasField("graph") and model.ir_version and (model.graph.node or model.opset_import):
            return model
    raise ModelError(f"'{path}' is not an ONNX model, or is cut short; export or download it again")


def same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, through links too."""
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


def _keep_sources(target: Path, sources: Mapping[str, Path]) -> None:
    for file in sources.values():
        if same(target, file):
            raise SettingsError(f"'{target}' is a data file of the source model; choose another output name")


def _serialize(model: onnx.ModelProto) -> bytes | None:
    try:
        content = model.SerializeToString()
    except (EncodeError, ValueError):  # beyond the limit; which one depends on the protobuf backend
        return None
    return content if len(content) < _LIMIT else None


def _inlined(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in filter(is_external, tensors_of(copy)):
        _inline(tensor, tensor, folder)
    return copy


def _inline(source: onnx.TensorProto, target: onnx.TensorProto, folder: Path) -> None:
    target.raw_data = b"".join(raw_chunks(source, folder))
    target.ClearField("external_data")
    target.ClearField("data_location")


def _skeleton(
    model: onnx.ModelProto, name: str, folder: Path
) -> tuple[onnx.ModelProto, list[tuple[int, onnx.TensorProto]], int, str]:
    """The model without its large tensors, these with their offsets in the data file, the file's size and name."""
    skeleton = onnx.ModelProto()
    skeleton.graph.SetInParent()
    _copy_fields(model, skeleton, frozenset(("graph",)))
    _copy_fields(model.graph, skeleton.graph, frozenset(("initializer",)))
    for tensor in model.graph.initializer:
        _copy_fields(tensor, skeleton.graph.initializer.add(), _PAYLOAD if is_large(tensor) else frozenset())
    top = len(model.graph.initializer)
    moved: list[tuple[int, onnx.TensorProto]] = []
    targets: list[tuple[onnx.TensorProto, int, int]] = []
    end = 0
    for index, (tensor, target) in enumerate(zip(tensors_of(model), tensors_of(skeleton), strict=True)):
        if is_large(tensor) and (index < top or is_external(tensor)):
            offset = -(-end // _ALIGNMENT) * _ALIGNMENT
            size = size_of(tensor) or 0
            end = offset + size
            moved.append((offset, tensor))
            targets.append((target, offset, size))
        elif is_external(tensor):
            _inline(tensor, target, folder)
    location = f"{name}.{_hash(_padded(moved, folder))}.data"
    for target, offset, size in targets:
        _refer(target, location, offset, size)
    return skeleton, moved, end, location


def _hash(chunks: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:8]


def _copy_fields(source: Message, target: Message, without: frozenset[str]) -> None:
    for field, value in source.ListFields():
        if field.name in without:
            continue
        if isinstance(value, int | float | str | bytes):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).MergeFrom(value)
    copy_unknown(source, target)


def _refer(tensor: onnx.TensorProto, location: str, offset: int, size: int) -> None:
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.ClearField("external_data")
    for key, value in (("location", location), ("offset", offset), ("length", size)):
        tensor.external_data.add(key=key, value=str(value))


def _padded(moved: list[tuple[int, onnx.TensorProto]], folder: Path) -> Iterator[bytes]:
    end = 0
    for offset, tensor in moved:
        yield bytes(offset - end)
        yield from raw_chunks(tensor, folder)
        end = offset + (size_of(tensor) or 0)
