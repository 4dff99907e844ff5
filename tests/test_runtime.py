"""The fence around ONNX Runtime: clear errors, shapes and counts from one profiled run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from onnx_lowrank import measure
from onnx_lowrank.errors import ModelError, RuntimeMissing, SettingsError
from onnx_lowrank.runtime import Session, profile, provider_name, with_outputs

MODEL = """<ir_version: 8, opset_import: ["" : 17]>
two (float[n, 4] x) => (float[n, 2] y) <float[4, 3] a = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3, 2] b = {1,2,3,4,5,6}>
{ t = MatMul(x, a)  y = MatMul(t, b) }"""


def test_a_profiled_run_knows_shapes_counts_and_multiply_adds() -> None:
    runs = profile(onnx.parser.parse_model(MODEL), {"x": np.ones((5, 4), np.float32)}, folder=Path())
    assert [(runs[i].input_shapes[0], runs[i].output_shapes[0], runs[i].count) for i in (0, 1)] == [
        ((5, 4), (5, 3), 1),
        ((5, 3), (5, 2), 1),
    ]
    assert measure.multiply_adds(runs) == 5 * 4 * 3 + 5 * 3 * 2


def test_a_tapped_model_holds_only_what_its_outputs_need() -> None:
    model = onnx.parser.parse_model(MODEL)
    tapped = with_outputs(model, ["t"])
    assert [node.output[0] for node in tapped.graph.node] == ["t"]
    assert [tensor.name for tensor in tapped.graph.initializer] == ["a"]
    assert len(model.graph.node) == 2
    assert Session(tapped).run({"x": np.ones((2, 4), np.float32)})[0].tolist() == [[22, 26, 30]] * 2


def test_a_tapped_model_holds_what_a_body_reads() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    f (float[2] x, bool c) => (float[2] y, float[2] z) <float[2] w = {1, 2}, float[2] unread = {3, 4}>
    { k = Mul(x, w)
      t = If(c) <then_branch = a () => (float[2] p) { p = Neg(k) }, else_branch = b () => (float[2] q) { q = Abs(k) }>
      y = Identity(t)
      z = Add(x, unread) }"""
    tapped = with_outputs(onnx.parser.parse_model(text), ["t"])
    assert [node.output[0] for node in tapped.graph.node] == ["k", "t"]
    assert [tensor.name for tensor in tapped.graph.initializer] == ["w"]


def test_inputs_are_named_with_dtype_and_shape() -> None:
    assert Session(onnx.parser.parse_model(MODEL)).inputs() == [("x", np.dtype("float32"), ("n", 4))]


def test_a_model_that_the_runtime_refuses_is_one_line() -> None:
    broken = onnx.parser.parse_model(MODEL.replace("MatMul(t, b)", "NoSuchOperator(t, b)"))
    with pytest.raises(ModelError, match="ONNX Runtime cannot load it") as caught:
        Session(broken)
    assert "\n" not in str(caught.value)


def test_a_sample_that_fails_is_one_line() -> None:
    with pytest.raises(ModelError, match="fails on a sample"):
        Session(onnx.parser.parse_model(MODEL)).run({"x": np.ones((5, 7), np.float32)})


def test_an_unknown_provider_gets_a_suggestion() -> None:
    with pytest.raises(SettingsError, match="no execution provider is called 'cpuu'; did you mean 'cpu'"):
        provider_name("cpuu")


def test_a_provider_that_this_build_lacks_is_named() -> None:
    with pytest.raises(RuntimeMissing, match="this ONNX Runtime has only"):
        provider_name("rocm")


@pytest.mark.parametrize("spin", [False, True])
def test_threads_spin_for_timing_only(spin: bool) -> None:
    options = Session(onnx.parser.parse_model(MODEL), spin=spin)._session.get_session_options()
    if spin:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry("session.intra_op.allow_spinning")
    else:
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
