"""Models on disk with as many sample files beside them: what the tests of whole runs start from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper


def save(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    tensors: Sequence[onnx.TensorProto],
    output: str,
    samples: npt.NDArray[np.float32],
) -> None:
    """Write `m.onnx`, from `x` (n×width) to an output of the same shape, and one `data-….npz` for each sample.

    Args:
        samples: count×n×width.
    """
    x, y = (helper.make_tensor_value_info(t, onnx.TensorProto.FLOAT, ["n", samples.shape[-1]]) for t in ("x", output))
    graph = helper.make_graph(list(nodes), "blocks", [x], [y], list(tensors))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m.onnx")
    for i, sample in enumerate(samples):
        np.savez(folder / f"data-{i:02}.npz", x=sample)


ROW = {"dense": 0.050, "dense again": 0.0502, "svd 16": 0.020, "svd 32": 0.0201, "svd 128": 0.060}
"""Ranks 16 and 32 take the same time, and 128 is slower than dense."""


def by_work(width: int) -> dict[str, float]:
    """Times as the work of a weight of width×width is: its share of a millisecond, and a little for another node."""
    row = {"dense": 1.0, "dense again": 1.0}
    for rank in range(16, width, 16):
        row[f"svd {rank}"] = 2 * rank / width + 0.004
        row[f"pivot {rank}"] = rank * (2 * width - rank) / width**2 + 0.006
    return row


def save_table(path: Path, width: int, read: str = "64", row: Mapping[str, float] = ROW) -> Path:
    """Write a table of times: a row, for a MatMul with a weight of width×width and an input of read×width."""
    environment = {"processor": "a processor", "provider": "cpu", "threads": 1}
    rows = {f"MatMul {width}x{width} float32 x={read}x{width} bias=0 right": row}
    path.write_text(json.dumps({"environment": environment, "ms": rows}))
    return path


def data(folder: Path) -> list[dict[str, Any]]:
    """The samples, in their order."""
    return [dict(np.load(path)) for path in sorted(folder.glob("data-*.npz"))]
