"""Nodes that the runtime ran, told apart by the node of the original that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from onnx_lowrank import profiles
from onnx_lowrank.errors import ModelError
from onnx_lowrank.events import kernel_times
from onnx_lowrank.profiles import Profile, owners, profile_model, with_names

CONV = """<ir_version: 8, opset_import: ["" : 17]>
conv (float[1, 16, 128, 128] x) => (float[1, 16, 128, 128] y) <float[16, 16, 1, 1] w> {
    c = Conv(x, w)
    y = Relu(c)
}"""


def conv_model() -> onnx.ModelProto:
    text = CONV.replace("float[16, 16, 1, 1] w>", f"float[16, 16, 1, 1] w = {{{', '.join(['0.5'] * 256)}}}>")
    return parser.parse_model(text)


def test_a_convolution_is_found_behind_what_was_fused_into_it(tmp_path: Path) -> None:
    feed = {"x": np.ones((1, 16, 128, 128), np.float32)}  # a profile counts whole microseconds
    found = profile_model(conv_model(), feed, tmp_path, provider="cpu", threads=1, runs=2)
    times = found.by_owner()
    assert "Conv → c" in times
    assert "Relu → y" not in times or times["Relu → y"][1] == ["Relu"]
    assert all(ms > 0 for ms, _ in times.values())


def test_pools_in_the_blocked_layout_are_nodes_of_the_user(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    pools (float[1, 16, 128, 128] x) => (float[1, 16, 1, 1] y) <float[16, 16, 1, 1] w = {WEIGHT}> {
        c = Conv(x, w)
        m = MaxPool <kernel_shape: ints = [2, 2], strides: ints = [2, 2]>(c)
        a = AveragePool <kernel_shape: ints = [2, 2]>(m)
        y = GlobalAveragePool(a)
    }"""
    model = parser.parse_model(text.replace("{WEIGHT}", f"{{{', '.join(['0.5'] * 256)}}}"))
    feed = {"x": np.ones((1, 16, 128, 128), np.float32)}
    found = profile_model(model, feed, tmp_path, provider="cpu", threads=1, runs=2)
    names = {"Conv → c", "MaxPool → m", "AveragePool → a", "GlobalAveragePool → y"}
    assert names <= set(found.by_owner())
    made = {r["node"] for r in profiles.compared(found, found) if r["op"] == "made by the runtime"}
    assert made <= {"ReorderInput", "ReorderOutput"}


def event(name: str, us: int, kind: str = "Node", *, at: int = 0, op: str = "Conv") -> dict[str, Any]:
    return {"cat": kind, "name": name, "ts": at, "dur": us, "args": {"op_name": op}}


def test_the_time_of_a_node_is_the_least_of_its_warm_runs() -> None:
    """Once a run, twice a run in a loop, in one run of three, and what is no node's kernel; the first run is cold."""
    once = [event("a_kernel_time", us, at=k) for k, us in enumerate((1, 9, 5))]
    looped = [event("b_kernel_time", us, at=k) for k, us in enumerate((1, 1, 8, 7, 3, 30))]
    seldom = [event("c_kernel_time", 6)]
    other = [event("a_fence_before", 1), event("model_run", 1), event("d_kernel_time", 1, "Session")]
    ms, ops = kernel_times([*once, *looped, *seldom, *other], 3)
    assert ms == pytest.approx({"a": 0.005, "b": 0.015, "c": 0.002})
    assert ops == dict.fromkeys("abc", "Conv")


def test_nodes_of_bodies_count_once() -> None:
    """An If around a Conv and another If, which holds a Conv; then one that holds nothing; bodies come first."""
    inner = [event("a_kernel_time", 20, at=12), event("b_kernel_time", 30, at=43)]
    holders = [event("in_kernel_time", 40, at=40, op="If"), event("out_kernel_time", 75, at=10, op="If")]
    after = [event("c_kernel_time", 9, at=85), event("last_kernel_time", 4, at=94, op="If")]
    ms, ops = kernel_times([*inner, *holders, *after], 1)
    assert ms == pytest.approx({"out": 0.015, "a": 0.02, "in": 0.01, "b": 0.03, "c": 0.009, "last": 0.004})
    assert ops["out"] == "If"


def test_a_body_of_the_length_of_its_if_counts_once() -> None:
    ms, _ = kernel_times([event("in_kernel_time", 3, at=7), event("if_kernel_time", 3, at=7, op="If")], 1)
    assert ms == pytest.approx({"in": 0.003, "if": 0.0})


def test_an_if_does_not_count_what_its_branch_does(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    ifs (bool c, float[256, 256] x) => (float[256, 256] y) {
        y = If (c) <then_branch = t () => (float[256, 256] z) { m = MatMul(x, x) z = MatMul(m, x) },
                    else_branch = e () => (float[256, 256] z) { z = Identity(x) }>
    }"""
    feed = {"c": np.array(True), "x": np.ones((256, 256), np.float32)}
    found = profile_model(parser.parse_model(text), feed, tmp_path, provider="cpu", threads=1, runs=3)
    inside = sum(ms for name, ms in found.ms.items() if found.ops[name] == "MatMul")
    (around,) = (ms for name, ms in found.ms.items() if found.ops[name] == "If")
    assert 0 <= around < inside / 4


def test_unnamed_and_repeated_nodes_get_names_of_their_own() -> None:
    model = conv_model()
    names = [node.name for node in with_names(model).graph.node]
    assert names == ["Conv → c", "Relu → y"]
    assert [node.name for node in model.graph.node] == ["", ""]
    for node in model.graph.node:
        node.name = "same"
    assert [node.name for node in with_names(model).graph.node] == ["same", "Relu → y"]
    model.graph.node[1].name = "other"
    assert with_names(model) is model


def test_factors_belong_to_their_site() -> None:
    model = with_names(conv_model())
    model.graph.node[0].metadata_props.add(key="onnx_lowrank.site", value="site")
    model.graph.node[0].metadata_props.add(key="onnx_lowrank.pass", value="svd")
    known = owners(model)
    assert known["Conv → c"] == known["c_nchwc"] == known["y_nchwc"] == "site"
    assert profiles.kinds(model) == {"site": "svd"}
    assert profiles.owner_of("Conv → c/fused/2", known) == "site"
    assert profiles.owner_of("ReorderInput_3", known) is None


def made(ms: dict[str, float], ops: dict[str, str], own: dict[str, str], to: dict[str, str] | None = None) -> Profile:
    return Profile(ms, ops, to or {name: name for name in own}, own)


BEFORE = made({"a": 3.0, "b": 1.0}, {"a": "FusedConv", "b": "Relu"}, {"a": "Conv", "r": "Relu", "b": "Relu"})
AFTER = made(
    {"a/0": 0.5, "a/1": 0.7, "b": 1.0, "t": 0.1, "ReorderInput": 0.2},
    {"a/0": "Conv", "a/1": "Conv", "b": "Relu", "t": "Transpose", "ReorderInput": "ReorderInput"},
    {"a/0": "Conv", "a/1": "Conv", "b": "Relu", "t": "Transpose"},
    {"a/0": "a", "a/1": "a", "b": "b", "t": "t"},
)


def test_milliseconds_before_and_after_by_node_of_the_original() -> None:
    rows = {row["node"]: row for row in profiles.compared(BEFORE, AFTER, {"a": "svd"})}
    assert list(rows) == ["a", "b", "ReorderInput", "t"]
    assert (rows["a"]["before_ms"], rows["a"]["after_ms"], rows["a"]["choice"]) == (3.0, 1.2, "svd")
    assert (rows["a"]["ran_before"], rows["a"]["ran_after"]) == ("FusedConv", "2 Conv")
    assert rows["t"] | {"choice": None} == {
        "node": "t", "op": "Transpose", "choice": None, "before_ms": None, "after_ms": 0.1,
        "ran_before": None, "ran_after": "Transpose",
    }  # fmt: skip
    assert rows["ReorderInput"]["op"] == "made by the runtime"


def test_fusions_lost_and_data_movement_introduced() -> None:
    found = {
        row["op"]: (row["what"], row["before"], row["after"], row["change"], row["lost_at"])
        for row in profiles.fusions(BEFORE, AFTER)
    }
    assert found == {
        "FusedConv": ("fusion", 1, 0, "lost", ["a"]),
        "ReorderInput": ("data movement", 0, 1, "introduced", []),
        "Transpose": ("data movement", 0, 1, "introduced", []),
    }


def test_a_fusion_that_moved_is_lost_where_it_was() -> None:
    own = {"a": "Conv", "b": "Conv"}
    before, after = (made({n: 1.0}, {n: "FusedConv"}, own) for n in ("a", "b"))
    (row,) = profiles.fusions(before, after)
    assert (row["before"], row["after"], row["change"], row["lost_at"]) == (1, 1, "as before", ["a"])


def test_a_model_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "MOST_BYTES", 10)
    with pytest.raises(ModelError, match="too large"):
        profile_model(conv_model(), {}, tmp_path, provider="cpu", threads=1)


def test_operators_of_bodies_are_the_models_own(tmp_path: Path) -> None:
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <then_branch = t () => (float[2] a) { a = Softsign(x) },
                        else_branch = e () => (float[2] b) { b = Neg(x) }>
        }"""
    )
    feed = {"c": np.array(True), "x": np.ones(2, np.float32)}
    found = profile_model(model, feed, tmp_path, provider="cpu", threads=1, runs=2)
    assert "Softsign" in found.ops.values()
    assert profiles.fusions(found, found) == []
