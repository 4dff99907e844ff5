"""Why a site stays dense, and what happens when the saved file does not hold: give back, or stay unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_lowrank
from onnx_lowrank import outcome, verify
from onnx_lowrank.errors import RequirementError, VerificationError
from onnx_lowrank.sites import Why
from onnx_lowrank.timing import Ratio
from onnx_lowrank.verify import Measured
from tests.races import FASTER, answering

WIDTH = 384


def save(path: Path, weights: list[Any]) -> Path:
    """A stack of MatMuls behind Relus."""
    nodes, tensors, name = [], [], "x"
    for i, weight in enumerate(weights):
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{i}"], [f"t{i}"], name=f"layer{i}"))
        nodes.append(helper.make_node("Relu", [f"t{i}"], [f"y{i}"]))
        name = f"y{i}"
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", weights[0].shape[0]])
    y = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", weights[-1].shape[1]])
    graph = helper.make_graph(nodes, "stack", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def low_rank(rng: np.random.Generator, rank: int = 16) -> Any:
    return rng.standard_normal((WIDTH, rank)) @ rng.standard_normal((rank, WIDTH)) / WIDTH


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outcome")
    rng = np.random.default_rng(0)
    save(folder / "low.onnx", [low_rank(rng) for _ in range(3)])
    orthogonal = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    save(folder / "mixed.onnx", [orthogonal, rng.standard_normal((WIDTH, 1))])
    return folder


def optimize(home: Path, model: str, **choices: Any) -> onnx_lowrank.Report:
    rng = np.random.default_rng(1)
    data = [{"x": rng.standard_normal((64, WIDTH)).astype(np.float32)} for _ in range(16)]
    return onnx_lowrank.optimize(
        home / model, home / f"out-{model}", data=data, cache=home / "cache", **{"max_loss": 1e-6, **choices}
    )


def test_dense_has_its_reason(home: Path) -> None:
    report = optimize(home, "mixed.onnx", kinds=("svd", "pivot"))
    assert not report
    assert [d.why for d in report.plan.decisions] == [Why.LOSS, Why.TOO_SMALL]
    assert "no faster rank stays within the loss" in report.verdict.reason
    assert (home / "out-mixed.onnx").read_bytes() == (home / "mixed.onnx").read_bytes()


def test_the_site_that_loses_most_is_given_back(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "measured", answering((0.5, FASTER), (None, FASTER)))
    report = optimize(home, "low.onnx")
    assert report
    assert [d.why for d in report.plan.decisions].count(Why.GIVEN_BACK) == 1
    assert len(report.plan.rewritten) == 2


def test_half_is_given_back_when_it_is_not_faster(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "measured", answering((None, Ratio(1.0, 0.9, 1.1)), (None, FASTER)))
    report = optimize(home, "low.onnx")
    assert [d.why for d in report.plan.decisions].count(Why.GIVEN_BACK) == 2
    (left,) = report.plan.rewritten
    saved = (left.ms_before or 0.0) - (left.ms_after or 0.0)
    assert (
        0 < report.additivity["before_ms"] - report.additivity["predicted_ms"] < 3 * saved
    )  # of one site, not of three


def test_what_is_left_of_a_plan_is_held_by_all_samples_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three sites two are given back for speed, and the third for what all samples lose."""
    asked: list[int] = []
    monkeypatch.setattr(outcome, "measured", answering((None, Ratio(1.0, 0.9, 1.1)), (None, FASTER)))
    monkeypatch.setattr(outcome, "passes", lambda _, plan: asked.append(sum(d.kind is not None for d in plan)))
    report = optimize(home, "low.onnx")
    assert asked == [1]
    assert report.verdict.status == "unchanged"
    assert report.additivity == {}


def test_what_is_never_faster_passes_through(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "measured", answering((None, Ratio(1.01, 1.0, 1.02))))
    report = optimize(home, "low.onnx")
    assert report.verdict.status == "unchanged"
    assert {d.why for d in report.plan.decisions} == {Why.GIVEN_BACK}
    assert (home / "out-low.onnx").read_bytes() == (home / "low.onnx").read_bytes()


def test_a_gain_within_the_control_is_no_gain(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = verify.measured

    def noisy(*given: Any) -> Measured:
        found = real(*given)
        entry = found.latency[0]
        return Measured(found.loss, (type(entry)(**{**vars(entry), "aa": Ratio(50.0, 40.0, 60.0)}),))

    monkeypatch.setattr(outcome, "measured", noisy)
    assert not optimize(home, "low.onnx")


def test_a_replayed_plan_that_does_not_hold_writes_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "measured", answering((None, FASTER), (0.5, FASTER)))
    plan = optimize(home, "low.onnx").plan
    data = [{"x": np.random.default_rng(1).standard_normal((64, WIDTH)).astype(np.float32)} for _ in range(8)]
    with pytest.raises(VerificationError, match="nothing was written"):
        onnx_lowrank.apply(plan, home / "low.onnx", home / "none.onnx", data=data, cache=home / "cache")
    assert not (home / "none.onnx").exists()


def test_a_required_speedup_must_be_sure(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "measured", answering((None, FASTER)))
    with pytest.raises(RequirementError, match="not surely 1000"):
        optimize(home, "low.onnx", require_speedup=1000.0)
    with pytest.raises(RequirementError, match="no speed-up within loss"):
        optimize(home, "mixed.onnx", require_speedup=1.1)
