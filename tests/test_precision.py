"""Models in the precision that will be deployed: against the runtime's own arithmetic, refusals, one run end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_lowrank
from onnx_lowrank import cache, columns, outcome
from onnx_lowrank.columns import Column
from onnx_lowrank.errors import LowRankError, SettingsError
from onnx_lowrank.graph import Graph
from onnx_lowrank.latency import LatencyTable, fragment_model
from onnx_lowrank.measure import Latency
from onnx_lowrank.normal import normal
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.plan import Plan
from onnx_lowrank.precision import Lowering
from onnx_lowrank.quantization import OPSET, half, static
from onnx_lowrank.ranges import Histogram, by_channel, extremes, histograms
from onnx_lowrank.report import Report
from onnx_lowrank.runtime import Session
from onnx_lowrank.scheme import Scheme
from onnx_lowrank.schemes import check_precision
from onnx_lowrank.sites import Geometry, Why
from tests.races import FASTER, with_ratio

CHANNELS, SIDE, RANK, LAYERS = 128, 24, 8, 3
"""Of so low a rank that little is left of the multiply-adds, in 8 bits too."""


def save(path: Path, opset: int = 13) -> Path:
    """Convolutions of a rank behind Relus; a BatchNormalization behind the first."""
    rng = np.random.default_rng(0)
    nodes, tensors, name = [], [], "x"
    for i in range(LAYERS):
        left, right = rng.standard_normal((CHANNELS, RANK)), rng.standard_normal((RANK, CHANNELS * 9))
        weight = (left @ right * 1.4 / (RANK * CHANNELS * 9) ** 0.5).reshape(CHANNELS, CHANNELS, 3, 3)
        arrays = {f"w{i}": weight, f"b{i}": 0.1 * rng.standard_normal(CHANNELS)}
        if i == 0:
            arrays |= {name: rng.uniform(0.5, 1.5, CHANNELS) for name in ("gamma", "beta", "mean", "variance")}
        tensors += [numpy_helper.from_array(a.astype(np.float32), key) for key, a in arrays.items()]
        pads: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1] * 4}
        nodes.append(helper.make_node("Conv", [name, f"w{i}", f"b{i}"], [f"t{i}"], name=f"conv{i}", **pads))
        if i == 0:
            norm = ["t0", "gamma", "beta", "mean", "variance"]
            nodes.append(helper.make_node("BatchNormalization", norm, ["n0"], name="norm"))
        nodes.append(helper.make_node("Relu", ["n0" if i == 0 else f"t{i}"], [f"y{i}"]))
        name = f"y{i}"
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", CHANNELS, SIDE, SIDE]) for n in ("x", name))
    graph = helper.make_graph(nodes, "convs", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7), path)
    np.savez(path.with_suffix(".npz"), x=np.abs(rng.standard_normal((16, CHANNELS, SIDE, SIDE))).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    save(folder / "m.onnx")
    return folder


@pytest.fixture(scope="module")
def reports(home: Path) -> dict[str, Report]:
    """One run in int8 with all that it writes, and its replay."""
    given: dict[str, Any] = {"data": str(home / "m.npz"), "cache": home / "cache"}
    report = onnx_lowrank.optimize(
        home / "m.onnx", home / "out.onnx", precision="int8", keep_fp32=home / "fp32.onnx", kinds=("conv_svd",), **given
    )
    (home / "plan.json").write_text(report.plan.to_json())
    return {
        "optimize": report,
        "apply": onnx_lowrank.apply(home / "plan.json", home / "m.onnx", home / "again.onnx", **given),
    }


def samples(home: Path, count: int = 4) -> list[dict[str, Any]]:
    return [{"x": x[None]} for x in np.load(home / "m.npz")["x"][:count]]


def loss(model: Path | onnx.ModelProto, home: Path) -> float:
    ours, original = Session(model), Session(home / "m.onnx")
    pairs = [(original.run(s)[0], ours.run(s)[0]) for s in samples(home)]
    return sum(float(((a - b) ** 2).sum()) for a, b in pairs) / sum(float((a**2).sum()) for a, _ in pairs)


def test_the_four_models_are_measured_side_by_side(home: Path, reports: dict[str, Report]) -> None:
    report = reports["optimize"].to_dict()
    names = [row["name"] for row in report["precisions"]]
    assert names == ["original", "int8 alone", "low rank alone", "low rank and int8"]
    original, alone, factored, both = report["precisions"]
    assert both["bytes"] < min(alone["bytes"], factored["bytes"]) < original["bytes"]
    assert both["bytes"] == (home / "out.onnx").stat().st_size
    assert both["over_precision_ci"][0] > 1
    assert report["verdict"]["precision"].startswith("int8 (static")
    assert "faster than int8 alone" in reports["optimize"].verdict.sentence()
    assert both["loss"] == pytest.approx(report["verdict"]["loss"])
    assert max(row["loss"] for row in report["precisions"]) <= 0.01
    assert {way["method"] for way in report["ways"]} == {"static"}


def test_out_is_quantised_and_the_float_model_is_kept_beside(home: Path, reports: dict[str, Report]) -> None:
    assert reports["optimize"].plan.rewritten
    made, kept = onnx.load(home / "out.onnx"), onnx.load(home / "fp32.onnx")
    onnx.checker.check_model(made, full_check=True)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {n.op_type for n in made.graph.node}
    assert {n.op_type for n in kept.graph.node} <= {"Conv", "Relu", "BatchNormalization"}
    assert loss(home / "fp32.onnx", home) < loss(home / "out.onnx", home) < 0.01


def test_a_plan_is_replayed_to_the_same_bytes(home: Path, reports: dict[str, Report]) -> None:
    assert Plan.from_json((home / "plan.json").read_text()) == reports["optimize"].plan
    assert reports["optimize"].plan.scheme is not None
    assert (home / "again.onnx").read_bytes() == (home / "out.onnx").read_bytes()


def test_times_of_a_precision_have_their_own_table(home: Path, reports: dict[str, Report]) -> None:
    assert reports["optimize"].staircases
    tables = [json.loads(path.read_text())["environment"] for path in (home / "cache").glob("*.json")]
    assert len(tables) == 1
    assert tables[0]["precision"].startswith("int8 static")
    entry = cache.export(home / "cache", home / "table.json", precision=tables[0]["precision"])
    assert entry.geometries > 0
    with pytest.raises(SettingsError, match="no table for provider cpu with 1 threads in int8 none"):
        cache.export(home / "cache", home / "table.json", precision="int8 none")
    plain = LatencyTable(home / "cache", provider="cpu", threads=1)
    assert not plain.rows([])
    assert not plain.path.exists()
    made = next((home / "cache").glob("*.json"))
    with pytest.raises(SettingsError, match="measured in int8 static"):
        LatencyTable(made, provider="cpu", threads=1)


def test_a_model_that_is_quantised_is_refused_and_else_left_alone(home: Path, reports: dict[str, Report]) -> None:
    assert reports["optimize"]
    given: dict[str, Any] = {"data": str(home / "m.npz"), "cache": home / "cache"}
    with pytest.raises(SettingsError, match=r"--precision int8: the model is quantised already \(\w+Linear\)"):
        onnx_lowrank.optimize(home / "out.onnx", home / "z.onnx", precision="int8", **given)
    report = onnx_lowrank.optimize(home / "out.onnx", home / "z.onnx", **given)
    assert report.verdict.status == "unchanged"
    assert Why.DEQUANTIZED.value in report.to_dict()["kept"]
    assert (home / "z.onnx").read_bytes() == (home / "out.onnx").read_bytes()


def test_where_no_site_can_be_factored_int8_alone_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = columns.columns_of

    def faster(*given: Any) -> tuple[tuple[Latency, ...], tuple[Column, ...]]:
        """What a processor with instructions for 8 bits measures."""
        latency, found = real(*given)
        return with_ratio(latency, FASTER), found

    monkeypatch.setattr(outcome, "columns_of", faster)
    path = save(tmp_path / "m.onnx")
    given: dict[str, Any] = {"data": str(tmp_path / "m.npz"), "cache": tmp_path / "cache", "kinds": ("svd",)}  # of 1×1
    report = onnx_lowrank.optimize(path, tmp_path / "out.onnx", precision="int8", max_loss=2e-3, **given)
    assert report
    assert not report.plan.rewritten
    assert report.verdict.reason == "no site was factored: int8 alone is the best here"
    assert [row["name"] for row in report.to_dict()["precisions"]] == ["original", "int8 alone"]
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node}
    assert loss(tmp_path / "out.onnx", tmp_path) <= 2e-3


def test_sites_that_8_bits_cost_too_much_stay_in_float(home: Path) -> None:
    """With a limit below what int8 alone loses, some sites are left in float, and the file holds the limit."""
    given: dict[str, Any] = {"data": str(home / "m.npz"), "cache": home / "cache", "kinds": ("conv_svd",)}
    report = onnx_lowrank.optimize(
        home / "m.onnx", home / "x.onnx", precision="int8", max_loss=2e-4, confidence=0.5, refit=False, **given
    )
    scheme = report.plan.scheme
    assert scheme is not None
    assert scheme.exclude
    assert set(scheme.exclude) <= {d.node for d in report.plan.rewritten}, "factored in float"
    assert len(scheme.exclude) < len(report.plan.decisions), "the others in 8 bits"
    assert report.verdict.loss <= 2e-4
    made = onnx.load(home / "x.onnx").graph
    names = {t.name for t in made.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 4}
    assert {name.partition("/")[0] for name in names} == set(scheme.exclude)
    entry = cache.export(home / "cache", home / "int8.json", precision=scheme.label)
    given |= {"cache": entry.path, "max_loss": 2e-4}
    report = onnx_lowrank.analyze(home / "m.onnx", precision="int8", refit=False, **given)
    assert {d.node for d in report.plan.decisions if d.why is Why.IN_FLOAT} == set(scheme.exclude)


def test_a_float16_model_is_recognised(home: Path) -> None:
    model = half(onnx.load(home / "m.onnx"))
    sites = survey(Graph(model, home)).sites
    dtypes = {site.geometry.dtype for site in sites}
    assert dtypes == {"float16"}
    assert check_precision(model, "fp16", dtypes) is None
    assert check_precision(model, None, dtypes) is None
    with pytest.raises(SettingsError, match="weights are float16"):
        check_precision(model, "int8", dtypes)
    plain = onnx.load(home / "m.onnx")
    assert check_precision(plain, "fp32", {"float32"}) is None
    assert check_precision(plain, "int8", {"float32"}, 10**9) == "int8"
    with pytest.raises(SettingsError, match=r"2\.8 GB, and converters take 2 GB"):
        check_precision(plain, "int8", {"float32"}, 28 * 10**8)


def test_half_keeps_inputs_and_outputs(home: Path) -> None:
    model = Lowering(Scheme("fp16"), home, "cpu").model(onnx.load(home / "m.onnx"))
    types = {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert types == {TensorProto.FLOAT}
    assert 0 < loss(model, home) < 1e-5


@pytest.mark.parametrize("bad", ["int4", "INT8"])
def test_an_unknown_precision_gets_a_suggestion(bad: str) -> None:
    with pytest.raises(SettingsError, match=f"no precision is called '{bad}'"):
        onnx_lowrank.Settings(precision=bad)


def test_a_float_model_beside_needs_a_precision(home: Path) -> None:
    with pytest.raises(SettingsError, match="--keep-fp32 goes with --precision"):
        onnx_lowrank.optimize(home / "m.onnx", home / "z.onnx", keep_fp32=home / "k.onnx")
    with pytest.raises(LowRankError, match="is the output itself"):
        onnx_lowrank.optimize(home / "m.onnx", home / "z.onnx", keep_fp32=home / "z.onnx", precision="int8")


def test_the_normal_form_computes_the_same(home: Path) -> None:
    made = normal(onnx.load(home / "m.onnx"), home)
    assert "BatchNormalization" not in {node.op_type for node in made.graph.node}
    assert all(node.name for node in made.graph.node)
    assert loss(made, home) < 1e-12


def test_an_older_operator_set_is_brought_to_what_scales_by_channel_need(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", opset=11)
    made = normal(onnx.load(path), tmp_path, OPSET)
    assert made.opset_import[0].version == OPSET
    assert loss(made, tmp_path) < 1e-12


def test_a_quantised_fragment_gives_the_integers_of_its_formula() -> None:
    """y8 = z_y + round(s_x s_w (w8 · (x8 − z_x)) / s_y), clipped: what the runtime computes on bytes."""
    geometry = Geometry("MatMul", 8, 12, "float32", False, 13, x_shape=(5, 12))
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((8, 12))
    model = fragment_model(dense_fragment(geometry, weight / 8, np.zeros(8)), geometry)
    lowered, feed = Lowering(Scheme("int8", "static", "extremes", True), Path(), "cpu").fragment(
        model, rng.standard_normal((5, 12)).astype(np.float32)
    )
    arrays = {t.name: numpy_helper.to_array(t) for t in lowered.graph.initializer}
    (x8,) = feed.values()
    assert x8.dtype == np.uint8
    scales = {name.removesuffix("_scale"): a for name, a in arrays.items() if name.endswith("_scale")}
    w8 = next(a for name, a in arrays.items() if name.endswith("_quantized") and a.ndim == 2).astype(np.int64)
    product = (x8.astype(np.int64) - int(arrays["x_zero_point"])) @ w8
    s_w = next(a for a in scales.values() if a.ndim == 1 and a.size == 8)
    y = product * (scales["x"] * s_w)
    quantised = [np.asarray(o) for o in Session(lowered).run(feed)]
    rounded = np.rint(y / scales["y"]) + int(arrays["y_zero_point"])
    assert (quantised[0] == np.clip(rounded, 0, 255)).all()


def test_excluded_sites_stay_in_float(home: Path) -> None:
    model = normal(onnx.load(home / "m.onnx"), home, OPSET)
    names = [*(o for n in model.graph.node for o in n.output), "x"]
    ranges = extremes(model, home, samples(home), names, "cpu")
    made = static(model, ranges, exclude={"conv1"}, linear_only=True)
    floats = {t.name for t in made.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 4}
    assert floats == {"w1"}
    assert loss(made, home) < 0.001


def test_ranges_are_those_of_the_samples(home: Path) -> None:
    model = normal(onnx.load(home / "m.onnx"), home)
    values = np.concatenate([Session(model).run(s)[0] for s in samples(home)])
    name = model.graph.output[0].name
    found = extremes(model, home, samples(home), [name, "x"], "cpu")
    assert found[name] == pytest.approx((values.min(), values.max()), rel=1e-5)
    assert found["x"][1] == pytest.approx(max(s["x"].max() for s in samples(home)))
    counted = histograms(model, home, samples(home), found, "cpu")
    assert counted["x"].counts.sum() == sum(s["x"].size for s in samples(home))
    channels = by_channel(model, home, samples(home), {name: 1}, "cpu")[name]
    np.testing.assert_allclose(channels.mean, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(channels.high, values.max((0, 2, 3)), rtol=1e-5)


def test_a_clipped_range_has_less_error_where_outliers_are_rare() -> None:
    counts = np.zeros(2048)
    counts[:200], counts[-1] = 1e6, 1
    low, high = Histogram(0.0, 100.0, counts).clipped()
    assert low == 0
    assert 9 < high < 60
    assert Histogram(0.0, 100.0, np.ones(2048)).clipped() == (0.0, 100.0)
