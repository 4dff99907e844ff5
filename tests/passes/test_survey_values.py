"""Values that a survey must not trust: overridable, foreign, not finite, not unique."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from onnx_lowrank.fitting import calibrate
from onnx_lowrank.graph import Graph
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.prepare import load
from onnx_lowrank.rewrite import patch_of
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Keep, Site, Why

HEAD = '<ir_version: 8, opset_import: ["" : 17, "my" : 1]>'
W = "float[2, 2] w = {1, 2, 3, 4}"
NORM = "float[1, 1, 1] w = {1}, float[1] g = {1}, float[1] b = {0}, float[1] m = {0}, float[1] v = {1}"
X = np.ones((1, 2), np.float32)


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEAD + text)


def sites(model: onnx.ModelProto) -> tuple[Site, ...]:
    return survey(Graph(model, Path())).sites


def kept(model: onnx.ModelProto) -> tuple[Keep, ...]:
    return survey(Graph(model, Path())).kept


def run(model: onnx.ModelProto, feed: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed)[0])


def densely_rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = Graph(model, Path())
    for site in survey(graph).sites:
        fragment = dense_fragment(site.geometry, site.weight.astype(float), site.bias_vector)
        graph.apply(patch_of(site, fragment, "dense"))
    return graph.commit()


@pytest.mark.parametrize("text", ["t = MatMul(x, w)\n y = Add(t, b)", "y = Gemm(x, w, b)"])
def test_a_bias_that_a_caller_may_override_is_honoured(text: str) -> None:
    model = parse(f"g (float[n, 2] x, float[2] b) => (float[n, 2] y) <{W}, float[2] b = {{1, 1}}> {{ {text} }}")
    feed = {"x": X, "b": np.array([100, 200], np.float32)}
    assert np.array_equal(run(model, feed), run(densely_rewritten(model), feed))


def test_norm_parameters_that_a_caller_may_override_are_not_folded() -> None:
    model = parse(
        f"g (float[n, 1, 4] x, float[1] b) => (float[n, 1, 4] y) <{NORM}>"
        "{ t = Conv(x, w)\n y = BatchNormalization(t, g, b, m, v) }"
    )
    assert sites(model)[0].nodes == (0,)


def test_site_names_are_unique_also_where_a_name_is_anothers_output() -> None:
    model = parse(
        "g (float[n, 2] x) => (float[n, 2] y, float[n, 3] t) <float[2, 2] v = {1, 2, 3, 4},"
        "float[2, 3] w = {1, 2, 3, 4, 5, 6}> { t = MatMul(x, w)\n y = MatMul(x, v) }"
    )
    model.graph.node[1].name = "t"
    assert len({site.name for site in sites(model)}) == 2


def test_an_operator_of_another_domain_is_not_evaluated() -> None:
    model = parse(
        f"g (float[n, 2] x) => (float[n, 2] y) <{W}> {{ v = my.Transpose(w)\n y = MatMul(x, v) }}"
        '<domain: "my", opset_import: ["" : 17]> Transpose (a) => (r) { r = Neg(a) }'
    )
    assert np.array_equal(run(model, {"x": X}), run(densely_rewritten(model), {"x": X}))


@pytest.mark.parametrize("text", ["y = MatMul(w, x)", "y = MatMul(x, w)"])
def test_a_single_vector_is_calibrated(tmp_path: Path, text: str) -> None:
    onnx.save(parse(f"g (float[2] x) => (float[2] y) <{W}> {{ {text} }}"), tmp_path / "m.onnx")
    settings = Settings(cache=tmp_path)
    loaded = load(tmp_path / "m.onnx", [{"x": X[0] * i} for i in range(1, 5)], settings, lambda *_: None)
    fits = calibrate(loaded, settings, lambda *_: None)
    assert np.isfinite(next(iter(fits.values())).mean).all()


def test_a_large_float64_weight_is_finite() -> None:
    model = parse("g (double[n, 2] x) => (double[n, 2] y) <double[2, 2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }")
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([[1e300, 1], [1, 1]]), "w"))
    assert kept(model) == ()


def test_a_norm_without_variance_is_not_folded() -> None:
    model = parse(
        f"g (float[n, 1, 4] x) => (float[n, 1, 4] y) <{NORM.replace('v = {1}', 'v = {0}')}>"
        "{ t = Conv(x, w)\n y = BatchNormalization <epsilon = 0.0> (t, g, b, m, v) }"
    )
    assert sites(model)[0].nodes == (0,)


def test_an_alpha_that_overflows_the_weight_is_refused() -> None:
    model = parse("g (float16[n, 2] x) => (float16[n, 2] y) { y = Gemm <alpha = 100000.0> (x, w) }")
    model.graph.initializer.append(numpy_helper.from_array(np.full((2, 2), 1.0, np.float16), "w"))
    assert [k.why for k in kept(model)] == [Why.NOT_FINITE]


def test_a_bias_that_is_not_finite_is_not_folded() -> None:
    model = parse(
        f"g (float[n, 2] x) => (float[n, 2] y) <float[2] b = {{1, 1}}, {W}> {{ t = MatMul(x, w)\n y = Add(t, b) }}"
    )
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([np.nan, 1], np.float32), "b"))
    assert sites(model)[0].nodes == (0,)


def test_a_sparse_constant_node_is_sparse() -> None:
    model = parse("g (float[n, 2] x) => (float[n, 2] y) { y = MatMul(x, w) }")
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, np.int64)), [2, 2])
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], sparse_value=sparse))
    assert kept(model)[-1].why is Why.SPARSE


def test_a_weight_of_another_shape_is_a_site_unless_a_caller_may_set_the_shape() -> None:
    plain = parse(
        "g (float[n, 2] x) => (float[n, 2] y) <float[4] w = {1, 2, 3, 4}, int64[2] s = {2, -1}>"
        "{ v = Reshape(w, s)\n y = MatMul(x, v) }"
    )
    written = densely_rewritten(plain)
    assert [n.op_type for n in written.graph.node] == ["MatMul"]
    assert not {"w", "s"} & {t.name for t in written.graph.initializer}
    assert np.array_equal(run(plain, {"x": X}), run(written, {"x": X}))
    plain.graph.input.append(helper.make_tensor_value_info("s", onnx.TensorProto.INT64, [2]))
    assert [k.why for k in kept(plain) if k.op == "MatMul"] == [Why.WEIGHT_NOT_CONSTANT]
