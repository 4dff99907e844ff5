"""Models on disk with as many sample files beside them: what the tests of whole runs start from."""

from __future__ import annotations

from collections.abc import Sequence
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


def data(folder: Path) -> list[dict[str, Any]]:
    """The samples, in their order."""
    return [dict(np.load(path)) for path in sorted(folder.glob("data-*.npz"))]
