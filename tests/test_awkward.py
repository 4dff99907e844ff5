"""Ordinary awkwardness and broken models, through the command line: finished, or one line that says what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as Tensor
from onnx import helper, numpy_helper

from onnx_lowrank import cli

RNG = np.random.default_rng(0)
W = numpy_helper.from_array(RNG.standard_normal((8, 8)).astype(np.float32), "w")
EYE = numpy_helper.from_array(np.eye(8, dtype=np.float32), "v")
EMPTY = numpy_helper.from_array(np.zeros((8, 0), np.float32), "w")
SIGNS = numpy_helper.from_array((np.sign(RNG.standard_normal((8, 8))) * 6e4).astype(np.float16), "w")
NIBBLES = helper.make_tensor("q", Tensor.INT4, [8, 8], RNG.integers(-8, 8, 64))
MATMUL = helper.make_node("MatMul", ["x", "w"], ["y"])


def value(name: str, kind: int = Tensor.FLOAT, shape: Sequence[Any] | None = ("n", 8)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def node(text: str, **attributes: Any) -> onnx.NodeProto:
    """`a, b = Op(c, d)`."""
    outputs, _, call = text.partition(" = ")
    op, _, inputs = call.rstrip(")").partition("(")
    domain, _, op = op.rpartition(".")
    names = [name for name in inputs.split(", ") if name]
    return helper.make_node(op, names, outputs.split(", "), domain=domain, **attributes)


X, Y = value("x"), value("y")
OPTIONAL = helper.make_value_info("x", helper.make_optional_type_proto(X.type))
BRANCHES = {
    "then_branch": helper.make_graph([node("p = MatMul(x, w)")], "a", [], [value("p")]),
    "else_branch": helper.make_graph([node("q = Identity(x)")], "b", [], [value("q")]),
}
FINE: dict[str, tuple[list[onnx.NodeProto], list[Any], list[Any], list[Any]]] = {
    "wrong declared shape": ([MATMUL], [X], [value("y", shape=("n", 5))], [W]),
    "one initializer twice": ([MATMUL], [X], [Y], [W, W]),
    "zero-size weight": ([MATMUL], [X], [value("y", shape=("n", 0))], [EMPTY]),
    "scalar input": ([node("a = Mul(x, s)"), node("y = MatMul(a, w)")], [X, value("s", shape=())], [Y], [W]),
    "weight of NaN": ([MATMUL], [X], [Y], [numpy_helper.from_array(np.full((8, 8), np.nan, np.float32), "w")]),
    "strings": (
        [node("u = Identity(t)"), MATMUL], [X, value("t", Tensor.STRING, "k")],
        [Y, value("u", Tensor.STRING, "k")], [W],
    ),
    "integers and booleans": (
        [node("f = Cast(i)", to=1), node("a = Add(f, x)"), node("b = MatMul(a, w)"), node("y = Where(c, b, x)")],
        [X, value("i", Tensor.INT64), value("c", Tensor.BOOL)], [Y], [W],
    ),
    "no sites": ([node("y = Relu(x)")], [X], [Y], []),
    "no inputs": ([node("y = MatMul(w, v)")], [], [value("y", shape=(8, 8))], [W, EYE]),
    "a weight of 4 bits": (
        [node("w = DequantizeLinear(q, s)", axis=0, block_size=4), MATMUL], [X], [Y],
        [NIBBLES, helper.make_tensor("s", Tensor.FLOAT, [2, 8], RNG.random(16))],
    ),
    "a site in a branch": ([node("y = If(c)", **BRANCHES)], [X, value("c", Tensor.BOOL, ())], [Y], [W]),
    "an output of booleans": ([MATMUL, node("z = Greater(y, x)")], [X], [value("z", Tensor.BOOL)], [W]),
    "an output that is a sequence": (
        [MATMUL, node("z = SequenceConstruct(y, x)")], [X],
        [Y, helper.make_tensor_sequence_value_info("z", 1, None)], [W],
    ),
    "an input of no rows": ([MATMUL], [value("x", shape=(0, 8))], [value("y", shape=(0, 8))], [W]),
}  # fmt: skip
BROKEN: dict[str, tuple[list[onnx.NodeProto], list[Any], list[Any], list[Any], str]] = {
    "cycle": ([node("a = MatMul(b, w)"), node("b = Add(a, x)"), node("y = Relu(b)")], [X], [Y], [W], "acyclic"),
    "missing input": ([node("y = MatMul(q, w)")], [X], [Y], [W], "'q'"),
    "two nodes make one tensor": ([MATMUL, node("y = Relu(x)")], [X], [Y], [W], "Duplicate definition"),
    "two nodes of one name": (
        [node("a = MatMul(x, w)", name="s"), node("y = MatMul(a, v)", name="s")], [X], [Y], [W, EYE], "same node name",
    ),
    "unknown operator": ([node("y = Frobnicate(x)")], [X], [Y], [], "Frobnicate"),
    "unknown domain": ([node("y = acme.Foo(x)")], [X], [Y], [], "acme"),
    "huge dims without data": ([MATMUL], [X], [Y], [Tensor(name="w", data_type=1, dims=[2**40, 2**20])], "cannot load"),
    "an input of two billion rows": ([MATMUL], [value("x", shape=(2**31, 8))], [Y], [W], "memory"),
    "dynamic axes that are made up": ([MATMUL], [value("x", shape=(None, "k"))], [Y], [W], "--shape"),
    "an input of unknown rank": ([MATMUL], [value("x", shape=None)], [Y], [W], "--shape"),
    "no outputs": ([MATMUL], [X], [], [W], "output"),
    "a sequence": (
        [node("a = ConcatFromSequence(x)", axis=0), node("y = MatMul(a, w)")],
        [helper.make_tensor_sequence_value_info("x", 1, ["n", 8])], [Y], [W], "'x' is a seq(",
    ),
    "optional": (
        [node("a = OptionalGetElement(x)"), node("y = MatMul(a, w)")], [OPTIONAL], [Y], [W], "'x' is a optional(",
    ),
    "bfloat16 that the runtime cannot run": (
        [MATMUL], [value("x", Tensor.BFLOAT16)], [value("y", Tensor.BFLOAT16)],
        [helper.make_tensor("w", Tensor.BFLOAT16, [8, 8], RNG.random(64))], "NOT_IMPLEMENTED",
    ),
    "float16 that overflows by itself": (
        [MATMUL], [value("x", Tensor.FLOAT16)], [value("y", Tensor.FLOAT16)],
        [SIGNS], "not finite",
    ),
}  # fmt: skip


def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: tuple[Any, ...], capfd: pytest.CaptureFixture[str]
) -> tuple[int, str, Path]:
    nodes, inputs, outputs, weights = model[:4]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("acme", 1)]
    path, out = folder / "modèl 1.onnx", folder / "out" / "größe.onnx"
    out.parent.mkdir()
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    words = ["onnx-lowrank", "optimize", str(path), "-o", str(out), "-q", "--cache", str(folder / "cache")]
    monkeypatch.setattr(sys, "argv", words)
    code = cli.run()
    return code, capfd.readouterr().err, out


@pytest.mark.parametrize("name", FINE)
def test_what_the_runtime_runs_passes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    code, said, out = run(tmp_path, monkeypatch, FINE[name], capfd)
    assert (code, said) == (0, "")
    assert out.read_bytes() == (tmp_path / "modèl 1.onnx").read_bytes()
    assert [p.name for p in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("name", BROKEN)
def test_what_it_does_not_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    code, said, out = run(tmp_path, monkeypatch, BROKEN[name], capfd)
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert BROKEN[name][4] in said
    assert list(out.parent.iterdir()) == []
