"""Models in which only neighbours can be multiplied: written, because they are measured to be faster, and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_lowrank import outcome
from onnx_lowrank.latency import write_table
from onnx_lowrank.pipeline import apply, optimize
from tests.races import FASTER, answering


def save_pair(path: Path, between: int = 1024) -> None:
    """Two MatMuls of full rank through a wide tensor, whose product has a sixteenth of the multiply-adds."""
    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((128, between)) / 11, "b": rng.standard_normal((between, 128)) / 32}
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


def test_factors_that_are_slower_than_dense_are_composed_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through 48 of 128: the product has 1.33 times the multiply-adds of the factors that are in the model."""
    monkeypatch.setattr(outcome, "measured", answering((None, FASTER)))
    model, out, again = (tmp_path / name for name in ("m.onnx", "out.onnx", "again.onnx"))
    save_pair(model, 48)
    one, two = (f"MatMul {n} float32 x=512x{k} bias=0 right" for n, k in (("48x128", 128), ("128x48", 48)))
    row = {f"merge {one} {two} 128x128 float32 x=512x128 bias=0 right": {"pair": 2.0, "dense": 1.0}}
    write_table(tmp_path / "table.json", {"provider": "cpu", "threads": 1}, row)
    where: dict[str, Any] = {"data": str(tmp_path / "m.npz"), "cache": tmp_path / "table.json"}
    report = optimize(model, out, max_loss=1e-9, **where)
    assert report.verdict.status == "optimized"
    assert report.plan.merges == (("wide", "thin"),)
    assert (report.before.parameters, report.after.parameters) == (2 * 128 * 48, 128 * 128)
    assert report.verdict.loss < 1e-9
    write_table(tmp_path / "table.json", {"provider": "cpu", "threads": 1}, {})
    apply(report.plan, model, again, **where)
    assert again.read_bytes() == out.read_bytes()
