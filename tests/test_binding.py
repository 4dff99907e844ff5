"""Bound runs and copies of a fragment, on the CPU: what they compute is exactly what plain runs compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx.parser
import pytest

import onnx_lowrank
from onnx_lowrank import providers
from onnx_lowrank.binding import Bound
from onnx_lowrank.errors import ModelError
from onnx_lowrank.fragment import Fragment
from onnx_lowrank.fragments import copies_for, fragment_model
from onnx_lowrank.latency import DENSE, LatencyTable
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.svd import SVD
from onnx_lowrank.precision import Lowering
from onnx_lowrank.runtime import Feed, Session, node_times
from onnx_lowrank.scheme import Scheme
from onnx_lowrank.sites import Geometry

MODEL = """<ir_version: 8, opset_import: ["" : 17]>
two (float[n, 4] x, float[4] k) => (float[n, 3] y, float[n, 4] z)
<float[4, 3] a = {1,2,3,4,5,6,7,8,9,10,11,12}> { y = MatMul(x, a)  z = Add(x, k) }"""
CONV = Geometry(
    "Conv", 8, 36, "float32", True, 17, channels=4, kernel=(3, 3), strides=(1, 1), dilations=(1, 1), pads=(1, 1, 1, 1),
    then="Relu", x_shape=(1, 4, 6, 6),
)  # fmt: skip
GEMM = Geometry("MatMul", 32, 16, "float32", False, 17, x_shape=(4, 16))


def test_a_bound_run_computes_what_a_run_computes_and_keeps_its_places() -> None:
    session = Session(onnx.parser.parse_model(MODEL))
    feed = {"x": np.arange(8, dtype=np.float32).reshape(2, 4), "k": np.ones(4, np.float32)}
    bound = session.bound(feed)
    bound()
    places = bound.places()
    bound()
    assert bound.places() == places
    assert [device for device, _ in places] == ["cpu", "cpu"]
    for mine, theirs in zip(bound.outputs(), session.run(feed), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert set(bound.transfers(3)) == {"inputs_ms", "outputs_ms"}


def test_bfloat16_is_bound() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> f (bfloat16[3] x) => (float[3] y) { y = Cast<to = 1>(x) }'
    bound = Session(onnx.parser.parse_model(text)).bound({"x": np.array([1.5, -2, 0.25], ml_dtypes.bfloat16)})
    bound()
    assert bound.outputs()[0].tolist() == [1.5, -2, 0.25]


def test_inputs_that_do_not_fit_are_one_line() -> None:
    session = Session(onnx.parser.parse_model(MODEL))
    with pytest.raises(ModelError, match="cannot be bound"):
        session.bound({"x": np.zeros((2, 4), np.float32), "none": np.zeros(4, np.float32)})


@pytest.mark.parametrize("geometry", [CONV, GEMM], ids=["Conv", "MatMul"])
def test_copies_of_a_fragment_are_not_merged_and_compute_the_same(geometry: Geometry) -> None:
    rng = np.random.default_rng(0)
    n, k = geometry.outputs, geometry.inputs
    fragment = dense_fragment(geometry, rng.standard_normal((n, k)), rng.standard_normal(n))
    x = rng.standard_normal(geometry.x_shape).astype(np.float32)
    (alone,) = Session(fragment_model(fragment, geometry)).run({"x": x})
    three = fragment_model(fragment, geometry, 3)
    feed = {"x": x, "x_1": 2 * x, "x_2": x}
    outputs = Session(three).run(feed)
    ran = node_times(three, feed, Path(), provider="cpu", threads=1, runs=1)
    assert len([name for name in ran if "dense" in name or "nchwc" in name]) == 3, ran
    assert len(three.graph.node) == 3 * len(fragment_model(fragment, geometry).graph.node)
    np.testing.assert_array_equal(outputs[0], alone)
    np.testing.assert_array_equal(outputs[2], alone)
    assert not np.array_equal(outputs[1], alone)


def test_copies_of_a_fragment_go_to_fp16_together() -> None:
    rng = np.random.default_rng(0)
    fragment = dense_fragment(CONV, rng.standard_normal((8, 36)), rng.standard_normal(8))
    x = rng.standard_normal(CONV.x_shape).astype(np.float32)
    lowering = Lowering(Scheme("fp16"), Path(), "cpu")
    one, three = (lowering.fragment(fragment_model(fragment, CONV, n), x) for n in (1, 3))
    assert sorted(three[1]) == ["x", "x_1", "x_2"]
    (alone,) = Session(one[0]).run(one[1])
    for output in Session(three[0]).run(three[1]):  # the CPU may choose another order of sums for each
        np.testing.assert_allclose(output, alone, atol=float(np.finfo(np.float16).eps * abs(alone).max()))


def test_a_run_of_copies_takes_about_a_millisecond() -> None:
    assert copies_for(2.0, 1) == 1
    assert copies_for(0.3, 1) == 4
    assert copies_for(1e-9, 1) == 64
    assert copies_for(0.1, 64 << 20) == 2  # what they hold is bounded
    assert copies_for(0.1, 1 << 40) == 1


def test_the_time_of_copies_is_that_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts nodes, a fragment costs the same alone and among its copies."""
    table = LatencyTable(tmp_path, provider="cpu", threads=1)
    counts: list[int] = []

    def interleave(runs: object, **_: object) -> object:
        class Counted:
            @staticmethod
            def of(*_: object) -> tuple[object, str]:
                return np.array([counts]) * 1e-3, "nodes"

        del runs
        return Counted

    def counted(model: onnx.ModelProto, **_: object) -> Session:
        counts.append(len(model.graph.node))
        return Session(model)

    monkeypatch.setattr("onnx_lowrank.latency.timing.interleave", interleave)
    monkeypatch.setattr("onnx_lowrank.latency.runtime.Session", counted)
    dense = dense_fragment(GEMM, np.ones((32, 16)), np.zeros(32))
    thin = SVD.build(GEMM, np.ones((32, 4)), np.ones((4, 16)), np.zeros(32))
    assert table._time(GEMM, {DENSE: dense, "svd 4": thin}, 5) == {DENSE: 1.0, "svd 4": 2.0}


def test_the_path_of_a_card_is_walked_on_the_cpu(
    tmp_path: Path, low_rank_model: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a card changes, with the CPU in its place: copies of fragments, bound runs, transfers, first opening."""
    copies: list[int] = []

    def bound(self: Session, feed: Feed) -> Bound:
        return Bound(self._ort, self._session, feed, self.output_names, ("cpu", 0))

    def counted(fragment: Fragment, geometry: Geometry, count: int = 1) -> onnx.ModelProto:
        copies.append(count)
        return fragment_model(fragment, geometry, count)

    monkeypatch.setattr(providers, "NVIDIA", ("cpu",))
    monkeypatch.setattr(Session, "bound", bound)
    monkeypatch.setattr("onnx_lowrank.latency.fragment_model", counted)
    monkeypatch.setattr("onnx_lowrank.latency.copies_for", lambda *_: 3)  # a slow machine would need none
    low_rank_model(tmp_path / "wide.onnx")
    report = onnx_lowrank.optimize(
        tmp_path / "wide.onnx", tmp_path / "out.onnx", data=tmp_path / "wide.npz", cache=tmp_path / "cache", refit=False
    ).to_dict()
    assert report["status"] == "optimized"
    assert set(report["latency"][0]["transfers"]) == {"inputs_ms", "outputs_ms"}
    assert set(copies) == {1, 3}
    (row,) = (row for key, row in report["staircases"].items() if key.startswith("MatMul"))
    assert min(row.values()) < row["dense"]
