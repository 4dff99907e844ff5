"""FusedConv and FusedGemm: opened they compute the same, closed they are the same bytes, and their maps are sites."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from onnx_lowrank.files import ModelFile, read_model
from onnx_lowrank.fused import close_fused, open_fused
from onnx_lowrank.graph import Graph
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.plan import Decision
from onnx_lowrank.run import Clock, start
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Why

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)
IMAGE, ROWS = RNG.standard_normal((2, 6, 7, 8)).astype(np.float32), RNG.standard_normal((40, 12)).astype(np.float32)
WEIGHTS: dict[str, Array] = {
    "k": RNG.standard_normal((10, 6, 3, 3)),
    "b": RNG.standard_normal(10),
    "z": RNG.standard_normal((2, 10, 7, 8)),
    "w": RNG.standard_normal((8, 12)),
    "c": RNG.standard_normal(8),
}
CONVS: dict[str, dict[str, Any]] = {
    "none": {},
    "Relu": {},
    "Tanh": {},
    "Sigmoid": {},
    "LeakyRelu": {"activation_params": [0.3]},
    "HardSigmoid": {"activation_params": [0.3, 0.4]},
    "Clip": {"activation_params": [-0.5, 0.7]},
}
GEMMS: dict[str, dict[str, Any]] = {
    **{key: {} for key in ("Relu", "Tanh", "Sigmoid", "Softplus", "Softsign")},
    "LeakyRelu": {"activation_alpha": 0.3},
    "Elu": {"activation_alpha": 0.3},
    "ThresholdedRelu": {"activation_alpha": 0.3},
    "HardSigmoid": {"activation_alpha": 0.3, "activation_beta": 0.4},
    "Selu": {"activation_alpha": 1.5, "activation_gamma": 1.1},
}


def conv(activation: str, inputs: str, **attributes: Any) -> onnx.NodeProto:
    given = {"activation": activation} if activation != "none" else {}
    return helper.make_node(
        "FusedConv", inputs.split(), ["y"], name="conv", domain="com.microsoft", pads=[1] * 4, **given, **attributes
    )


def gemm(activation: str, inputs: str, **attributes: Any) -> onnx.NodeProto:
    given: dict[str, Any] = {"activation": activation, "transB": 1, "alpha": 0.5, "beta": 2.0, **attributes}
    return helper.make_node("FusedGemm", inputs.split(), ["y"], name="gemm", domain="com.microsoft", **given)


CASES = [
    *((conv(name, inputs, **given), IMAGE) for name, given in CONVS.items() for inputs in ("x k b", "x k", "x k b z")),
    *((gemm(name, inputs, **given), ROWS) for name, given in GEMMS.items() for inputs in ("x w c", "x w")),
]
cases = pytest.mark.parametrize(("node", "x"), CASES, ids=[f"{n.op_type}{i}" for i, (n, _) in enumerate(CASES)])


def file_of(node: onnx.NodeProto, x: Array, opset: int = 17, *more: onnx.NodeProto) -> ModelFile:
    graph = helper.make_graph(
        [node, *more], "g",
        [helper.make_tensor_value_info("x", 1, x.shape)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(WEIGHTS[n].astype(np.float32), n) for n in node.input if n in WEIGHTS],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return ModelFile(
        Path("m.onnx"), helper.make_model(graph, opset_imports=opsets, ir_version=8), "", 0, external=False
    )


def run(model: onnx.ModelProto, x: Array) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@cases
def test_an_opened_node_computes_the_same_and_is_a_site(node: onnx.NodeProto, x: Array) -> None:
    file = file_of(node, x)
    opened = open_fused(file)
    assert len(opened.opened) == 1
    assert not any(n.domain for n in opened.model.graph.node)
    expected = run(file.model, x)
    assert run(opened.model, x) == pytest.approx(expected, abs=2e-5 * float(np.abs(expected).max()))
    (site,) = survey(Graph(opened.model, Path())).sites
    assert (site.name, site.geometry.op, site.centred) == (node.name, node.op_type.removeprefix("Fused"), True)


@cases
def test_a_closed_model_is_the_same_bytes(node: onnx.NodeProto, x: Array) -> None:
    file = file_of(node, x)
    before = file.model.SerializeToString()
    opened = open_fused(file)
    assert file.model.SerializeToString() == before != opened.model.SerializeToString()
    assert close_fused(Graph(opened.model, Path()).commit(), opened.opened).SerializeToString() == before


def test_before_operator_set_11_a_clip_has_attributes() -> None:
    file = file_of(conv("Clip", "x k b", activation_params=[-0.5, 0.7]), IMAGE, 9)
    opened = open_fused(file)
    assert [n.op_type for n in opened.model.graph.node] == ["Conv", "Clip"]
    assert run(opened.model, IMAGE) == pytest.approx(run(file.model, IMAGE), abs=1e-4)


@pytest.mark.parametrize(
    ("node", "x"),
    [
        (conv("LeakyRelu", "x k b"), IMAGE),
        (conv("HardSigmoid", "x k b", activation_params=[0.3]), IMAGE),
        (conv("HardSwish", "x k b"), IMAGE),
        (conv("Relu", "x x b"), IMAGE),
        (conv("Relu", "x"), IMAGE),
        (gemm("LeakyRelu", "x w c"), ROWS),
        (gemm("Gelu", "x w c"), ROWS),
        (gemm("Selu", "x w c", activation_alpha=1.0), ROWS),
        (gemm("", "x w c"), ROWS),
        (gemm("Elu", "x w c", activation_alpha="0.3"), ROWS),
    ],
)
def test_what_it_cannot_be_sure_of_stays_fused(node: onnx.NodeProto, x: Array) -> None:
    file = file_of(node, x)
    assert open_fused(file) is file
    found = survey(Graph(file.model, Path()))
    assert (found.sites, [keep.why for keep in found.kept]) == ((), [Why.UNSUPPORTED_OP])


def test_names_that_are_taken_are_not_given_out() -> None:
    file = file_of(conv("Relu", "x k b"), IMAGE)
    node = file.model.graph.node[0]
    node.output[0] = "conv/Conv"
    file.model.graph.node.append(helper.make_node("Neg", ["conv/Conv"], ["y"], name="conv/Relu"))
    opened = open_fused(file)
    made = [n.output[0] for n in opened.model.graph.node]
    assert len(set(made)) == len(made) == 3
    assert len({n.name for n in opened.model.graph.node}) == 3
    assert run(opened.model, IMAGE) == pytest.approx(run(file.model, IMAGE), abs=1e-4)


def test_only_what_is_rewritten_is_plain_in_the_result(tmp_path: Path) -> None:
    nodes = [
        helper.make_node(
            "FusedGemm", [x, w], [y], name=name, domain="com.microsoft", transB=1, activation="Relu"
        )
        for name, x, w, y in (("one", "x", "w", "t"), ("two", "t", "v", "y"))
    ]  # fmt: skip
    file = file_of(nodes[0], ROWS, 17, nodes[1])
    file.model.graph.initializer.append(numpy_helper.from_array(RNG.standard_normal((6, 8)).astype(np.float32), "v"))
    path = tmp_path / "m.onnx"
    path.write_bytes(file.model.SerializeToString())
    samples = [{"x": RNG.standard_normal(ROWS.shape).astype(np.float32)} for _ in range(12)]
    known = start(path, samples, Settings(cache=tmp_path / "cache"), Clock(lambda *_: None))
    plan = (Decision("one", "Gemm", (8, 12), "svd", 7), Decision("two", "Gemm", (6, 8)))
    built = known.build(plan)
    assert [n.op_type for n in built.graph.node] == ["MatMul", "Gemm", "Relu", "FusedGemm"]
    assert built.graph.node[-1] == read_model(path).model.graph.node[-1]
    assert 0 < known.loss_of(plan) < 0.3
    full = dataclasses.replace(plan[0], rank=8), plan[1]
    assert known.loss_of(full) < 1e-9
