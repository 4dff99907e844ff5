"""What is not rewritten stays: every field of the model, in any state; functions opened on request; linear time."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_lowrank
from onnx_lowrank.calibration import Fits, factorize
from onnx_lowrank.chains import disjoint_chains
from onnx_lowrank.consumers import readers
from onnx_lowrank.files import read_model, write_model
from onnx_lowrank.functions import inlined
from onnx_lowrank.graph import Graph
from onnx_lowrank.moments import Moments
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.plan import Decision
from onnx_lowrank.rewrite import rewritten
from onnx_lowrank.runtime import Session
from onnx_lowrank.sites import Why

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = (
    b"\xfa\x3e\x03new\x80\x3f\x96\x01\x8d\x3f\x01\x02\x03\x04"
    b"\x91\x3f\x01\x02\x03\x04\x05\x06\x07\x08\x9b\x3f\x08\x01\x9c\x3f"
)
"""Fields 1007 to 1011 of a message, of every wire type, as a later version of ONNX may add them."""


def rich_model() -> onnx.ModelProto:
    """Two sites, a node in a later order than it is computed in, and every field that a rewrite could lose."""
    rng = np.random.default_rng(0)
    w = [numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), f"w{i}") for i in range(3)]
    nodes = [
        helper.make_node("Relu", ["a"], ["b"], name="act", doc_string="stays"),  # before the node that makes `a`
        helper.make_node("MatMul", ["x", "w0"], ["a"], name="first", doc_string="goes"),
        helper.make_node("MatMul", ["b", "w1"], ["c"], name="second"),
        helper.make_node("Add", ["c", "w2"], ["y"], name="sum"),
    ]
    nodes[0].metadata_props.add(key="namespace", value="encoder")
    nodes[1].metadata_props.add(key="from", value="model.py:7")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8], doc_string="an input")
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])
    graph = helper.make_graph(nodes, "rich", [x], [y], w, doc_string="a graph")
    graph.value_info.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 8]) for n in "abc")
    graph.quantization_annotation.add(tensor_name="b").quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    graph.metadata_props.add(key="graph", value="meta")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.extra", 4)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="a test", producer_version="3")
    model.domain, model.model_version, model.doc_string = "org.example", 12, "a model"
    helper.set_model_props(model, {"alphabet": "abc\nü"})
    unused = helper.make_function("local", "Unused", ["p"], ["q"], [helper.make_node("Relu", ["p"], ["q"])], opsets[:1])
    model.functions.append(unused)
    model.training_info.add().algorithm.name = "sgd"
    return model


def with_unknown_fields(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fields that this version of ONNX does not know: of the model, its graph and a node that stays."""
    node = model.graph.node[0].SerializeToString() + UNKNOWN
    model.graph.node[0].ParseFromString(node)
    graph = model.graph.SerializeToString() + UNKNOWN
    model.graph.ParseFromString(graph)
    found = onnx.ModelProto()
    found.ParseFromString(model.SerializeToString() + UNKNOWN)
    return found


def half_rank(path: Path, *, provenance: bool = True, names: tuple[str, ...] = ("first",)) -> onnx.ModelProto:
    """Some sites at rank 2."""
    file = read_model(path)
    sites = survey(Graph(file.model, file.folder)).sites
    fits: dict[str, Any] = {}
    for site in sites:
        moments = Moments(site.geometry.outputs if site.tap == "output" else site.geometry.inputs)
        moments.add(np.random.default_rng(1).standard_normal((50, 8)))
        fits[site.name] = factorize(site, moments)
    decisions = [Decision(n, "MatMul", (8, 8), "svd", 2) for n in names]
    known: Fits = fits
    return rewritten(file, sites, known, decisions, provenance=provenance)


@pytest.mark.parametrize("external", [False, True])
def test_only_what_is_rewritten_differs(tmp_path: Path, external: bool) -> None:
    before = with_unknown_fields(rich_model())
    path = tmp_path / "model.onnx"
    path.write_bytes(before.SerializeToString())
    out = tmp_path / "out.onnx"
    write_model(half_rank(path), out, folder=tmp_path, external=external)
    after = read_model(out).model
    assert after.SerializeToString().count(UNKNOWN) == 3
    assert [n.name for n in after.graph.node] == ["act", "first/down", "first/up", "second", "sum"]
    stays = {n.name: n.SerializeToString() for n in before.graph.node if n.name != "first"}
    assert {n.name: n.SerializeToString() for n in after.graph.node if n.name in stays} == stays
    weights = {t.name: t.SerializeToString() for t in before.graph.initializer if t.name != "w0"}
    assert [t.name for t in after.graph.initializer] == ["w1", "w2", "first/down.weight", "first/up.weight"]
    assert {t.name: t.SerializeToString() for t in after.graph.initializer if t.name in weights} == weights
    assert after.graph.value_info == before.graph.value_info
    made = {p.key: p.value for p in after.graph.node[1].metadata_props}
    assert made == {"from": "model.py:7", "onnx_lowrank.pass": "svd", "onnx_lowrank.site": "first"}
    for model in (before, after):
        for field in ("node", "initializer"):
            model.graph.ClearField(field)
    assert after.SerializeToString(deterministic=True) == before.SerializeToString(deterministic=True)


def test_provenance_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(rich_model(), path)
    assert b"onnx_lowrank." in half_rank(path).SerializeToString()
    plain = half_rank(path, provenance=False)
    assert b"onnx_lowrank." not in plain.SerializeToString()
    assert [p.value for p in plain.graph.node[1].metadata_props] == ["model.py:7"]


def test_the_flag_leaves_no_provenance_in_the_file(tmp_path: Path, low_rank_model: Callable[..., None]) -> None:
    low_rank_model(tmp_path / "wide.onnx", layers=1)
    for kept in (True, False):
        report = onnx_lowrank.optimize(
            tmp_path / "wide.onnx", tmp_path / "out.onnx", data=str(tmp_path / "wide.npz"), provenance=kept,
            refit=False, kinds=("svd",), cache=tmp_path / "cache",
        )  # fmt: skip
        assert report.verdict.status == "optimized"
        assert (b"onnx_lowrank." in (tmp_path / "out.onnx").read_bytes()) == kept


def function_model() -> onnx.ModelProto:
    value = numpy_helper.from_array(np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32), "v")
    body = [helper.make_node("Constant", [], ["w"], value=value), helper.make_node("MatMul", ["a", "w"], ["b"])]
    function = helper.make_function("local", "Linear", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", k]) for n, k in (("x", 8), ("y", 4))]
    graph = helper.make_graph([helper.make_node("Linear", ["x"], ["y"], domain="local")], "g", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8)


def test_functions_are_opened_on_request(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(function_model(), path)
    file = read_model(path)
    closed = survey(Graph(file.model, file.folder))
    assert closed.sites == ()
    assert [k.op for k in closed.kept if k.why is Why.FUNCTION] == ["Constant", "MatMul"]
    opened = inlined(file)
    (site,) = survey(Graph(opened.model, file.folder)).sites
    assert site.geometry.op == "MatMul"
    assert (opened.sha256, opened.bytes) == (file.sha256, file.bytes)
    x = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    both = [Session(m).run({"x": x})[0] for m in (path, opened.model)]
    np.testing.assert_array_equal(*both)
    assert inlined(opened) is opened


def test_nothing_pays_in_a_small_function_so_the_file_passes_through(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(function_model(), path)
    report = onnx_lowrank.optimize(path, tmp_path / "out.onnx", inline_functions=True, cache=tmp_path)
    assert report.verdict.status == "unchanged"
    assert [d.op for d in report.plan.decisions] == ["MatMul"]
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()


def test_a_saved_file_reads_its_own_data_and_not_the_originals(
    tmp_path: Path, low_rank_model: Callable[..., None]
) -> None:
    """Model and OUT in different folders, both with external data."""
    low_rank_model(tmp_path / "plain.onnx", layers=2)
    (tmp_path / "there").mkdir()
    model = onnx.load(tmp_path / "plain.onnx")
    onnx.save(model, tmp_path / "there" / "wide.onnx", save_as_external_data=True, location="wide.data")
    (tmp_path / "here").mkdir()
    shutil.move(tmp_path / "there" / "wide.data", tmp_path / "store")  # a hard link into a store, as hubs make them
    (tmp_path / "there" / "wide.data").hardlink_to(tmp_path / "store")
    report = onnx_lowrank.optimize(
        tmp_path / "there" / "wide.onnx", tmp_path / "here" / "out ü.onnx", data=str(tmp_path / "plain.npz"),
        refit=False, kinds=("svd",), cache=tmp_path / "cache",
    )  # fmt: skip
    assert report.verdict.status == "optimized"
    (data,) = read_model(tmp_path / "here" / "out ü.onnx").data
    assert {p.name for p in (tmp_path / "here").iterdir()} == {"out ü.onnx", data}
    x = np.load(tmp_path / "plain.npz")["x"][0]
    assert len(Session(tmp_path / "here" / "out ü.onnx").run({"x": x})[0]) == len(x)


def residual_model(layers: int) -> onnx.ModelProto:
    nodes, weights, name = [], [], "x"
    for i in range(layers):
        weights.append(numpy_helper.from_array(np.eye(4, dtype=np.float32), f"w{i}"))
        nodes += [
            helper.make_node("MatMul", [name, f"w{i}"], [f"m{i}"], name=f"block/{i}"),
            helper.make_node("Relu", [f"m{i}"], [f"r{i}"]),
            helper.make_node("Add", [f"r{i}", name], [f"y{i}"]),
        ]
        name = f"y{i}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in ("x", name)]
    return helper.make_model(helper.make_graph(nodes, "deep", ends[:1], ends[1:], weights), ir_version=8)


def test_the_steps_of_a_large_graph_are_timed() -> None:
    command = [sys.executable, "tools/graph_times.py", "--layers", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "read",
        "graph",
        "survey",
        "rewrite",
        "write",
        "60",
    ]


def test_a_residual_stream_is_not_followed_from_every_site_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    plain = Graph.readers

    def counted(graph: Graph, tensor: str) -> list[int]:
        nonlocal asked
        asked += 1
        return plain(graph, tensor)

    steps = []
    for layers in (200, 800):
        graph = Graph(residual_model(layers), Path())
        sites = survey(graph).sites
        assert len(sites) == layers
        monkeypatch.setattr(Graph, "readers", counted)
        asked, at = 0, {s.nodes[0]: s for s in sites}
        disjoint_chains(graph, sites)
        for site in sites:
            readers(graph, site, at)
        steps.append(asked)
        monkeypatch.setattr(Graph, "readers", plain)
    assert steps[1] < 4.5 * steps[0]
