"""Scales and shifts around convolutions: outputs stay, nodes go, a second time changes nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnx_lowrank import measure
from onnx_lowrank.files import ModelFile
from onnx_lowrank.graph import Graph
from onnx_lowrank.merging import Read, merged, read
from onnx_lowrank.passes.absorb import absorptions
from onnx_lowrank.prepare import load
from onnx_lowrank.runtime import profile
from onnx_lowrank.settings import Settings

Array = npt.NDArray[Any]
EPS = float(np.finfo(np.float32).eps)
STEPS = ("Add", "Sub", "Mul", "Div")
C = 4
X = np.random.default_rng(0).standard_normal((2, C, 6, 5)).astype(np.float32)
BY_CHANNEL = [(C, 1, 1), (1, C, 1, 1), (), (1,), (1, 1, 1, 1)]


class Chain:
    """A model that is one node after the other; arrays among the inputs become constants."""

    def __init__(self, x: Array = X, seed: int = 0) -> None:
        self.x, self.last = x, "x"
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.outputs: list[str] = []
        self.values = np.random.default_rng(seed)

    def then(self, op: str, *constants: Any, first: bool = True, **attributes: Any) -> Chain:
        """One more node; the constants stand before the tensor where `first` is false."""
        names = []
        for value in constants:
            names.append(f"c{len(self.tensors)}")
            kind = np.dtype(self.x.dtype)
            self.tensors.append(numpy_helper.from_array(np.asarray(value, kind), names[-1]))
        inputs = [self.last, *names] if first else [*names, self.last]
        self.last = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [self.last], name=f"{op}{len(self.nodes)}", **attributes))
        return self

    def conv(self, n: int = C, group: int = 1, k: int = 3, *, bias: bool = True, **attributes: Any) -> Chain:
        weight = self.values.standard_normal((n, C // group, k, k)) / 3
        biases = [self.values.standard_normal(n)] if bias else []
        return self.then("Conv", weight, *biases, group=group, **attributes)

    def step(self, op: str, shape: tuple[int, ...] = (C, 1, 1), *, first: bool = True) -> Chain:
        value = self.values.uniform(0.5, 2, shape) * self.values.choice([-1, 1])
        return self.then(op, value, first=first)

    def file(self) -> ModelFile:
        kind = helper.np_dtype_to_tensor_dtype(self.x.dtype)
        graph = helper.make_graph(
            self.nodes, "g", [helper.make_tensor_value_info("x", kind, self.x.shape)],
            [helper.make_tensor_value_info(name, kind, None) for name in (self.last, *self.outputs)], self.tensors,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return ModelFile(Path("m.onnx"), model, "", 0, external=False)


def run(model: onnx.ModelProto, x: Array) -> list[Array]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(y, np.float64) for y in session.run(None, {"x": x})]


def absorbed(chain: Chain) -> Read:
    feeds = [{"x": chain.x}]
    return merged(read(chain.file(), feeds), feeds, Settings(precision="fp16"), lambda *_: False, None)[0]


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def check(chain: Chain, after: onnx.ModelProto) -> None:
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(after, strict_mode=True), full_check=True)
    for a, b in zip(run(chain.file().model, chain.x), run(after, chain.x), strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 2000 * EPS * max(1, np.abs(a).max())


PADDED: dict[str, Any] = {"pads": [1, 1, 1, 1]}
EXAMPLES: dict[str, tuple[Chain, list[str]]] = {
    "behind": (Chain().conv(**PADDED).step("Mul", (1,)).step("Add", (1,)).then("Relu"), ["Conv", "Relu"]),
    "before": (Chain().then("Relu").step("Div", ()).step("Mul", (1,)).step("Add").conv(), ["Relu", "Conv"]),
    "both": (Chain().step("Sub").conv(bias=False).step("Sub", first=False).then("Tanh"), ["Conv", "Tanh"]),
    "a shift before pads": (
        Chain().step("Div").step("Mul").step("Add").conv(**PADDED).then("Relu"), ["Add", "Conv", "Relu"],
    ),
    "a scale before pads": (Chain().step("Div").step("Mul").conv(auto_pad="SAME_UPPER"), ["Conv"]),
    "depthwise": (
        Chain().step("Mul").step("Sub").conv(group=C, **PADDED).step("Mul", (1,)), ["Add", "Conv"],
    ),
    "groups": (Chain().step("Sub").conv(n=6, group=2).step("Div", ()), ["Conv"]),
    "between two": (Chain().conv(k=1).step("Mul", ()).step("Add", ()).conv(group=2), ["Conv", "Conv"]),
    "a norm among them": (
        Chain().conv().then("BatchNormalization", *np.abs(np.random.default_rng(1).standard_normal((4, C))) + 0.1)
        .step("Mul", (1,)), ["Conv"],
    ),
    "line": (Chain(X[:, :, 0]).step("Add", (C, 1)).then("Conv", np.ones((3, C, 2))).step("Mul", ()), ["Conv"]),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_can_be_taken_in_is(name: str) -> None:
    chain, expected = EXAMPLES[name]
    after = absorbed(chain).file.model
    assert ops(after) == expected
    check(chain, after)


ALONE: dict[str, Chain] = {
    "a norm behind, which the runtime folds": Chain().conv().then("BatchNormalization", *np.ones((4, C))),
    "a norm before": Chain().then("BatchNormalization", *np.full((4, C), 2.0)).conv(),
    "one shift before pads": Chain().step("Add").conv(**PADDED),
    "a shift before pads that a scale of zero hides": Chain()
    .step("Add").then("Mul", np.array([1.0, 0, 2, 3]).reshape(C, 1, 1)).step("Add").conv(**PADDED),
    "one over it": Chain().step("Div", first=False).conv(),
    "along the width": Chain().step("Mul", (5,)).conv().then("Relu"),
    "an axis more": Chain().step("Mul", (1, 1, 1, 1, 1)).then("Reshape", X).conv(),
    "channels out of one": Chain(X[:, :1]).step("Mul").conv(),
    "another operator": Chain().then("Pow", np.full((C, 1, 1), 2.0)).conv(),
    "too large": Chain().then("Mul", np.full((C, 1, 1), 3e38)).then("Mul", np.full((C, 1, 1), 3e38)).conv(),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_be_taken_in_stays(name: str) -> None:
    chain = ALONE[name]
    if name == "an axis more":
        chain.nodes[1].input[1] = "shape"
        chain.tensors[1].CopyFrom(numpy_helper.from_array(np.array(X.shape), "shape"))
    before = chain.file().model.SerializeToString()
    assert absorbed(chain).file.model.SerializeToString() == before


@pytest.mark.parametrize("case", ["read twice", "an output", "shared weight", "weight is an output", "overridable"])
def test_what_others_see_stays(case: str) -> None:
    chain = Chain().step("Mul").conv()
    if case == "read twice":
        chain.nodes.append(helper.make_node("Neg", ["t0"], ["other"]))
        chain.outputs.append("other")
    elif case == "an output":
        chain.outputs.append("t0")
    elif case == "shared weight":
        chain.nodes.append(helper.make_node("Neg", ["c1"], ["other"]))
        chain.outputs.append("other")
    elif case == "weight is an output":
        chain.outputs.append("c1")
    file = chain.file()
    if case == "overridable":
        file.model.graph.input.append(helper.make_tensor_value_info("c1", 1, [C, C, 3, 3]))
    known = read(file, [{"x": X}])
    shapes = {p: (*one.input_shapes, *one.output_shapes) for p, one in known.runs[0].items()}
    assert list(absorptions(known.graph, shapes)) == []


def test_before_operator_set_7_operands_broadcast_otherwise() -> None:
    chain = Chain().step("Mul").conv()
    file = chain.file()
    known = read(file, [{"x": X}])
    shapes = {p: (*one.input_shapes, *one.output_shapes) for p, one in known.runs[0].items()}
    assert len(list(absorptions(known.graph, shapes))) == 1
    file.model.opset_import[0].version = 6
    assert list(absorptions(Graph(file.model, Path()), shapes)) == []


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))
    chain = Chain(seed=rng.getrandbits(32))
    for _ in range(rng.randint(1, 3)):
        for _ in range(rng.randint(0, 4)):
            op = rng.choice(STEPS)
            chain.step(op, rng.choice(BY_CHANNEL), first=op == "Div" or rng.random() < 0.5)
        if rng.random() < 0.3:
            chain.then(rng.choice(["Relu", "Tanh"]))
        if rng.random() < 0.15:
            chain.outputs.append(chain.last)
        group = rng.choice([1, 2, C])
        padding: dict[str, Any] = rng.choice([PADDED, {}, {"pads": [0, 1, 1, 0]}, {"auto_pad": "SAME_LOWER"}])
        chain.conv(group=group, k=rng.choice([1, 2]), bias=rng.random() < 0.7, **padding)
    if rng.random() < 0.7:
        chain.step(rng.choice(["Add", "Mul"]), rng.choice(BY_CHANNEL))
    chain.outputs = [name for name in dict.fromkeys(chain.outputs) if name not in ("x", chain.last)]
    return chain


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chains())
def test_outputs_and_work_stay_nodes_go_and_twice_is_once(chain: Chain) -> None:
    before, known = chain.file().model, absorbed(chain)
    after = known.file.model
    check(chain, after)
    work = [measure.multiply_adds(profile(m, {"x": chain.x}, folder=Path())) for m in (before, after)]
    assert work[0] == work[1]
    assert len(after.graph.node) <= len(before.graph.node)
    feeds = [{"x": chain.x}]
    again, more = merged(known, feeds, Settings(precision="fp16"), lambda *_: False, None)
    assert (again, more) == (known, ())


def test_a_plan_takes_in_what_it_has_taken_in_and_nothing_else(tmp_path: Path) -> None:
    chain = EXAMPLES["between two"][0]
    path = tmp_path / "m.onnx"
    path.write_bytes(chain.file().model.SerializeToString())
    data = [{"x": X + i} for i in range(4)]

    def found(planned: Any, **choices: Any) -> list[tuple[str, str]]:
        loaded = load(path, data, Settings(cache=tmp_path, **choices), lambda *_: None, planned)
        return [(one.taken_in, one.node) for one in loaded.merged]

    (pair,) = found(None)
    assert pair == ("Mul1, Add2", "Conv0")
    assert found(None, merge=False) == found(None, exclude=("Conv0",)) == found(()) == []
    assert found([pair], merge=False) == [pair]
