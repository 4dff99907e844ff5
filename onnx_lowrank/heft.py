"""How heavy a model is: models that should not be held whole, or not twice, are told by this module alone."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

from onnx_lowrank.errors import ModelError
from onnx_lowrank.tensors import is_external, size_of, tensors_of

HEAVY = 10**9
"""Bytes from which a model is heavy."""

_PARSED: Final = 64 << 20  # bytes of a file that is read for what it refers to; a larger one holds its weights itself


def external_bytes(model: Path | onnx.ModelProto) -> int:
    """Bytes of the weights that lie in data files; 0 where the model cannot be read, which others will say."""
    try:
        proto = _read(model) if isinstance(model, Path) else model
        return sum(size_of(tensor) or 0 for tensor in tensors_of(proto) if is_external(tensor))
    except (OSError, DecodeError, ModelError):
        return 0


def _read(path: Path) -> onnx.ModelProto:
    model = onnx.ModelProto()
    if path.stat().st_size <= _PARSED:
        model.ParseFromString(path.read_bytes())
    return model


def is_mapped(model: Path | onnx.ModelProto) -> bool:
    """Whether a session that is not timed should use the weights where they lie instead of packing copies of them."""
    return external_bytes(model) >= HEAVY


def is_heavy(model: Path | onnx.ModelProto) -> bool:
    """Whether two sessions of a model that are timed should not be open at the same time."""
    own = model.stat().st_size if isinstance(model, Path) else model.ByteSize()
    return own + external_bytes(model) >= HEAVY
