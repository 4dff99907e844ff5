"""Tests that need an NVIDIA card: `pytest -m gpu`. Without one, or without onnxruntime-gpu, they are skipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import onnx_lowrank
from onnx_lowrank import gpu, measure
from onnx_lowrank.errors import LowRankError, ModelError
from onnx_lowrank.fragment import Fragment
from onnx_lowrank.latency import CONTROL, DENSE, LatencyTable, environment
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.svd import SVD
from onnx_lowrank.placement import placed
from onnx_lowrank.providers import Provider
from onnx_lowrank.runtime import Session, load
from onnx_lowrank.sites import Geometry

pytestmark = pytest.mark.gpu

MODEL = """<ir_version: 8, opset_import: ["" : 17]>
two (float[n, 64] x) => (float[n, 32] y) { t = Relu(x)  y = MatMul(t, a) }"""
CUDA = Provider("cuda", {"use_tf32": "0"})


@pytest.fixture(autouse=True)
def _card() -> None:
    if "CUDAExecutionProvider" not in load().get_available_providers():
        pytest.skip("this ONNX Runtime was built without CUDA: install onnx-lowrank[gpu,cuda]")
    if not gpu.facts():
        pytest.skip("no NVIDIA card answers")


def model() -> onnx.ModelProto:
    made = onnx.parser.parse_model(MODEL)
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    made.graph.initializer.append(onnx.numpy_helper.from_array(weight, "a"))
    return made


def feed(rows: int = 8) -> dict[str, Any]:
    return {"x": np.random.default_rng(1).standard_normal((rows, 64)).astype(np.float32)}


def test_the_card_computes_what_the_processor_computes() -> None:
    (here,), (there,) = Session(model()).run(feed()), Session(model(), provider=CUDA).run(feed())
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-4)


def test_a_bound_run_stays_on_the_card() -> None:
    session = Session(model(), provider=CUDA)
    bound = session.bound(feed())
    bound()
    places = bound.places()
    bound()
    assert bound.places() == places
    assert {device for device, _ in places} == {"cuda"}
    np.testing.assert_array_equal(bound.outputs()[0], session.run(feed())[0])
    assert all(ms > 0 for ms in bound.transfers().values())


def test_a_captured_graph_computes_the_same() -> None:
    chosen = Provider("cuda", {"use_tf32": "0", "enable_cuda_graph": "1"})
    ready = measure.opened(model(), feed(), provider=chosen, threads=1, folder=None)
    for _ in range(3):
        ready.run()
    (expected,) = Session(model(), provider=chosen).run(feed())
    np.testing.assert_array_equal(ready.run.outputs()[0], expected)  # type: ignore[attr-defined]
    assert ready.first_run_ms > 0


def test_every_node_runs_on_the_card_or_is_named() -> None:
    assert placed(model(), feed(), Path(), provider=CUDA) == ()
    text = """<ir_version: 8, opset_import: ["" : 17]>
    f (float[n, 8] x) => (float[n, 8] y) { y = Det2(x) }""".replace("Det2", "Hardmax")
    left = placed(onnx.parser.parse_model(text), {"x": np.ones((2, 8), np.float32)}, Path(), provider=CUDA)
    assert all(p.why for p in left)


def test_fallback_is_refused_where_it_is_not_wanted() -> None:
    strict = Provider("cuda", fallback=False)
    Session(model(), provider=strict, purpose="verify")
    text = """<ir_version: 8, opset_import: ["" : 17]>
    f (float[3, 3] x) => (float y) { y = Det(x) }"""
    with pytest.raises(ModelError, match="cannot load"):
        Session(onnx.parser.parse_model(text), provider=strict, purpose="verify")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_fragments_are_timed_in_their_own_type(tmp_path: Path, dtype: str) -> None:
    geometry = Geometry("MatMul", 256, 256, dtype, False, 17, x_shape=(64, 256))

    def dense() -> Fragment:
        return dense_fragment(geometry, np.ones((256, 256)), np.zeros(256))

    def thin() -> Fragment:
        return SVD.build(geometry, np.ones((256, 16)), np.ones((16, 256)), np.zeros(256))

    table = LatencyTable(tmp_path, provider=CUDA, threads=1)
    times = table.measure(geometry, {DENSE: dense, "svd 16": thin, CONTROL: dense})
    assert all(ms > 0 for ms in times.values())


def test_the_table_names_the_card_and_the_options() -> None:
    found = environment(CUDA, 1)
    assert found["gpu"]
    assert found["provider_options"] == {"use_tf32": "0"}


def test_a_model_is_optimized_on_the_card(tmp_path: Path, low_rank_model: Callable[..., None]) -> None:
    low_rank_model(tmp_path / "wide.onnx", layers=4, width=2048)
    report = onnx_lowrank.optimize(
        tmp_path / "wide.onnx", tmp_path / "out.onnx", data=tmp_path / "wide.npz", provider="cuda", cache=tmp_path / "c"
    ).to_dict()
    assert report["verdict"]["provider"] == "cuda"
    assert report["environment"]["gpu"]["name"]
    assert report["environment"]["fallback"] == []
    if report["status"] == "optimized":
        assert report["latency"][0]["transfers"]["inputs_ms"] > 0


def test_tensorrt_loads_or_says_what_is_missing(tmp_path: Path) -> None:
    chosen = Provider("tensorrt", folder=tmp_path / "engines")
    try:
        ready = measure.opened(model(), feed(), provider=chosen, threads=1, folder=None)
    except LowRankError as fault:
        assert "\n" not in str(fault)  # noqa: PT017
        assert "tensorrt" in str(fault).lower()  # noqa: PT017
        return
    assert ready.first_run_ms > 0
    assert any((tmp_path / "engines").iterdir())
