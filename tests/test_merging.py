"""A model in which only neighbours can be multiplied: written, because it is measured to be faster, and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_lowrank.pipeline import apply, optimize


def save_pair(path: Path) -> None:
    """Two MatMuls of full rank through a wide tensor, whose product has a sixteenth of the multiply-adds."""
    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((128, 1024)) / 11, "b": rng.standard_normal((1024, 128)) / 32}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["t"], name="wide"),
        helper.make_node("MatMul", ["t", "b"], ["y"], name="thin"),
    ]
    ends = [helper.make_tensor_value_info(name, 1, ["n", 128]) for name in "xy"]
    tensors = [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "pair", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    np.savez(path.with_suffix(".npz"), x=rng.standard_normal((8, 512, 128)).astype(np.float32))


def test_what_is_only_merged_is_written_and_replayed_to_the_same_bytes(tmp_path: Path) -> None:
    model, out, again = (tmp_path / name for name in ("m.onnx", "out.onnx", "again.onnx"))
    save_pair(model)
    where: dict[str, Any] = {"data": str(tmp_path / "m.npz"), "cache": tmp_path / "cache"}
    report = optimize(model, out, max_loss=1e-9, **where)
    assert report.verdict.status == "optimized"
    assert report.plan.rewritten == ()
    assert report.plan.merges == (("wide", "thin"),)
    assert report.verdict.reason == "0 of 1 sites rewritten, neighbours taken in at 1 node"
    assert report.verdict.speedup.low > 2
    assert report.verdict.loss < 1e-9
    assert (report.before.parameters, report.after.parameters) == (2 * 128 * 1024, 128 * 128)
    assert report.before.macs == 16 * report.after.macs
    (merged,) = report.to_dict()["merged"]
    assert (merged["taken_in"], merged["node"]) == ("wide", "thin")
    rows = {row["node"]: row for row in report.details["profile"]}
    assert rows["wide"]["after_ms"] is None
    assert rows["thin"]["choice"] == "merge"
    apply(report.plan, model, again, **where)
    assert again.read_bytes() == out.read_bytes()
