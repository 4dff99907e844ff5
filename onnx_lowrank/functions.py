"""Model-local functions, opened: their bodies in the place of their calls."""

from __future__ import annotations

import dataclasses

import onnx
import onnx.inliner

from onnx_lowrank.errors import ModelError
from onnx_lowrank.files import ModelFile


def inlined(file: ModelFile) -> ModelFile:
    """The file with a ModelProto whose functions are inlined; hash and size stay those of the file on disk.

    Raises:
        ModelError: onnx cannot inline them.
    """
    if not file.model.functions:
        return file
    try:
        model = onnx.inliner.inline_local_functions(file.model)
    except Exception as fault:  # what the C++ code throws has no base class
        why = " ".join(str(fault).split())[:200]
        raise ModelError(f"'{file.path}': its functions cannot be inlined ({why}); run without inlining") from None
    return dataclasses.replace(file, model=model)
