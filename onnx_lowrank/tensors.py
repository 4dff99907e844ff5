"""Tensors of a model as arrays, wherever their bytes lie: in the model or in a data file beside it."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from onnx_lowrank.errors import ModelError

Array = npt.NDArray[Any]
_CHUNK: Final = 8 << 20
_SMALL: Final = 1024

_NAMES: Final = {
    "FLOAT": "float32", "DOUBLE": "float64", "FLOAT16": "float16", "BOOL": "bool",
    "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64",
    "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
    "COMPLEX64": "complex64", "COMPLEX128": "complex128", "BFLOAT16": "bfloat16",
    "FLOAT8E4M3FN": "float8_e4m3fn", "FLOAT8E4M3FNUZ": "float8_e4m3fnuz", "FLOAT8E5M2": "float8_e5m2",
    "FLOAT8E5M2FNUZ": "float8_e5m2fnuz", "FLOAT8E8M0": "float8_e8m0fnu",
}  # fmt: skip
_DTYPES: Final[dict[int, np.dtype[Any]]] = {
    onnx.TensorProto.DataType.Value(name): np.dtype(getattr(ml_dtypes, dtype, dtype))
    for name, dtype in _NAMES.items()
    if name in onnx.TensorProto.DataType.keys() and (hasattr(np, dtype) or hasattr(ml_dtypes, dtype))  # noqa: SIM118
}
_PACKED: Final = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where an external tensor lies: `size` bytes from `offset` in `file`."""

    file: Path
    location: str
    offset: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        """The bytes, a few megabytes at a time.

        Raises:
            ModelError: the file is shorter than it was when it was checked.
        """
        left = self.size
        with self.file.open("rb") as file:
            file.seek(self.offset)
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise ModelError(f"data file '{self.file}' became shorter while it was read; run again")
                left -= len(chunk)
                yield chunk


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors of the graph, its subgraphs, the functions and the training graphs, in order: initializers first.

    Of a sparse tensor these are its values and its indices.
    """
    yield from _in_graph(model.graph)
    for function in model.functions:
        yield from _in_nodes(function.node)
    for training in model.training_info:
        yield from _in_graph(training.initialization)
        yield from _in_graph(training.algorithm)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor's bytes lie in a data file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def size_of(tensor: onnx.TensorProto) -> int | None:
    """Bytes that dims and dtype need as raw data; None for strings and unknown dtypes.

    Raises:
        ModelError: a negative dimension.
    """
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"tensor '{tensor.name}' has a negative dimension {list(tensor.dims)}; export the model again")
    count = int(math.prod(tensor.dims))
    if tensor.data_type in _DTYPES:
        return count * _DTYPES[tensor.data_type].itemsize
    bits = _PACKED.get(_dtype_name(tensor))
    return None if bits is None else (count * bits + 7) // 8


def stored(tensor: onnx.TensorProto, folder: Path) -> Stored:
    """Where an external tensor of a model in `folder` lies; the file exists and is long enough.

    The path is checked as written: a link inside the folder may lead out of it, as in the stores of model hubs.

    Raises:
        ModelError: the location leaves the folder, the file is missing or too short, or the size is not that of
            the tensor.
    """
    where = f"tensor '{tensor.name}'"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file, location = _locate(entries.get("location", ""), folder, where)
    size = size_of(tensor)
    if size is None:
        raise ModelError(f"{where} has dtype {_dtype_name(tensor)}, which cannot be external; export the model again")
    offset = _number(entries.get("offset") or "0", "offset", where)
    length = _number(entries.get("length") or str(size), "length", where)
    if length != size:
        raise ModelError(
            f"{where} needs {size} bytes but its external data has {length}; export the model and its data again"
        )
    if offset + length > (there := file.stat().st_size):
        raise ModelError(
            f"{where} ends at byte {offset + length} of '{file}', which has {there}; get the complete data file"
        )
    return Stored(file, location, offset, size)


def data_files(model: onnx.ModelProto, folder: Path) -> dict[str, Path]:
    """The model's data files, by location relative to `folder`, sorted; every external tensor is checked.

    Raises:
        ModelError: see `stored`.
    """
    found = [stored(tensor, folder) for tensor in tensors_of(model) if is_external(tensor)]
    return {part.location: part.file for part in sorted(found, key=lambda part: part.location)}


def read_tensor(tensor: onnx.TensorProto, folder: Path) -> Array:
    """The tensor as an array, not to be written to: memory-mapped where external. bfloat16 is `ml_dtypes.bfloat16`.

    Raises:
        ModelError: the data's size does not fit dims and dtype, or the data file cannot be used (see `stored`).
    """
    if not is_external(tensor):
        return _from_fields(tensor)
    part = stored(tensor, folder)
    dtype = _DTYPES.get(tensor.data_type)
    if dtype is None:
        loaded = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        loaded.raw_data = b"".join(part.chunks())
        return _from_fields(loaded)
    if not part.size:
        return np.empty(tuple(tensor.dims), dtype)
    try:
        mapped: Array = np.memmap(part.file, np.uint8, "r", part.offset, (part.size,))
    except OSError as fault:
        raise ModelError(f"data file '{part.file}' cannot be read: {fault.strerror}; check its permissions") from None
    return _host_order(mapped.view(dtype)).reshape(tuple(tensor.dims))


def is_large(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor is worth a place in a data file and `raw_chunks` can give its bytes."""
    whole_bytes = is_external(tensor) or tensor.HasField("raw_data") or tensor.data_type in _DTYPES
    return whole_bytes and (size_of(tensor) or 0) >= _SMALL


def raw_chunks(tensor: onnx.TensorProto, folder: Path) -> Iterator[bytes]:
    """The tensor's raw data, from wherever it lies.

    Raises:
        ModelError: see `read_tensor`.
    """
    if is_external(tensor):
        yield from stored(tensor, folder).chunks()
    elif tensor.HasField("raw_data") and len(raw := tensor.raw_data) == size_of(tensor):
        yield raw
    else:
        yield make_tensor(tensor.name, _from_fields(tensor)).raw_data


def make_tensor(name: str, array: Array) -> onnx.TensorProto:
    """An initializer with little-endian raw data.

    Raises:
        ModelError: ONNX has no such dtype.
    """
    native = array.dtype.newbyteorder("=")
    data_type = next((key for key, dtype in _DTYPES.items() if dtype == native), None)
    if data_type is None:
        raise ModelError(f"tensor '{name}' has dtype {array.dtype}, which ONNX cannot store; convert it first")
    values = _host_order(array.astype(native, copy=False))
    return onnx.TensorProto(name=name, data_type=data_type, dims=array.shape, raw_data=values.tobytes())


def _in_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _in_sparse(graph.sparse_initializer)
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            yield from _in_sparse([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else [])
            yield from _in_sparse(attribute.sparse_tensors)
            if attribute.HasField("g"):
                yield from _in_graph(attribute.g)
            for graph in attribute.graphs:
                yield from _in_graph(graph)


def _in_sparse(found: Sequence[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for sparse in found:
        yield from (part for part in (sparse.values, sparse.indices) if part.ListFields())


def _dtype_name(tensor: onnx.TensorProto) -> str:
    known = onnx.TensorProto.DataType.values()
    return onnx.TensorProto.DataType.Name(tensor.data_type) if tensor.data_type in known else str(tensor.data_type)


def _locate(location: str, folder: Path, where: str) -> tuple[Path, str]:
    inside = os.path.normpath(location) if location else ".."
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
    if absolute or PureWindowsPath(inside).parts[:1] == ("..",) or "\0" in location:
        raise ModelError(
            f"{where} keeps its data in {location!r}, outside the model's folder; put the data file beside the model"
        )
    file = folder / inside
    if not file.is_file():
        raise ModelError(f"{where} keeps its data in '{file}', which is missing; put the data file beside the model")
    return file, Path(inside).as_posix()


def _number(text: str, what: str, where: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ModelError(f"{where} has the external {what} {text!r}, not a whole number; export the model again")
    return int(text)


def _from_fields(tensor: onnx.TensorProto) -> Array:
    dtype, shape = _DTYPES.get(tensor.data_type), tuple(tensor.dims)
    size = size_of(tensor)
    broken = f"tensor '{tensor.name}' holds data that does not fit {_dtype_name(tensor)}{list(shape)}"
    try:
        if tensor.HasField("raw_data") and size is not None:
            raw = tensor.raw_data
            if len(raw) != size:
                raise ValueError(f"{len(raw)} bytes, not {size}")
            if dtype is not None:
                return _host_order(np.frombuffer(raw, dtype)).reshape(shape)
        elif tensor.data_type == onnx.TensorProto.BFLOAT16:  # numpy_helper before onnx 1.19 makes it float32
            bits: Array = np.array(tensor.int32_data, np.uint16)
            return np.asarray(bits.view(ml_dtypes.bfloat16)).reshape(shape)
        return np.asarray(numpy_helper.to_array(tensor)).reshape(shape)
    except (ValueError, TypeError, KeyError, OverflowError) as fault:
        raise ModelError(f"{broken} ({' '.join(str(fault).split())}); export the model again") from None


def _host_order(array: Array) -> Array:
    return array.byteswap() if sys.byteorder == "big" and array.dtype.itemsize > 1 else array
