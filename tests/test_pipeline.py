"""Goals, metrics, sweeps and siblings, from Python, on small models whose weights have falling spectra.

What is decided is asked of a model that gains little, with a given table of times; what is raced gains much.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_lowrank
from onnx_lowrank import cache, probing
from onnx_lowrank.errors import SettingsError, VerificationError
from onnx_lowrank.latency import read_table
from onnx_lowrank.report import Report
from tests.saved import by_work, save_table

WIDTH, LAYERS, ROWS = 384, 3, 48
WIDE, STEEP = 768, 0.95
"""Of the model that gains much: at a loss of some hundredths it has a tenth of the multiply-adds left."""

ONE_KIND: dict[str, Any] = {"kinds": ("svd",)}
"""Of so much that is gained others take a part only, and their time."""


def weights(seed: int, width: int = WIDTH, fall: float = 0.985) -> list[npt.NDArray[np.float32]]:
    """Weights whose singular values fall like fall^i: every rank costs something."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(LAYERS):
        left, right = (np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in range(2))
        found.append((left * fall ** np.arange(width) @ right * 4).astype(np.float32))
    return found


def save(path: Path, arrays: list[Any], dtype: int = onnx.TensorProto.FLOAT) -> Path:
    nodes, tensors, name = [], [], "x"
    for i, array in enumerate(arrays):
        tensors.append(numpy_helper.from_array(array, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{i}"], [f"t{i}"], name=f"layer{i}"))
        nodes.append(helper.make_node("Tanh", [f"t{i}"], [f"y{i}"]))
        name = f"y{i}"
    x, y = (helper.make_tensor_value_info(n, dtype, ["b", "s", len(arrays[0])]) for n in ("x", name))
    graph = helper.make_graph(nodes, "stack", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stack")
    save(folder / "m.onnx", weights(0))
    rng = np.random.default_rng(9)
    np.savez(folder / "x.npz", x=rng.standard_normal((16, ROWS, WIDTH)).astype(np.float32))
    save_table(folder / "t.json", WIDTH, f"1x{ROWS}", by_work(WIDTH))
    save(folder / "steep.onnx", weights(0, WIDE, STEEP))
    np.savez(folder / "steep.npz", x=rng.standard_normal((16, ROWS, WIDE)).astype(np.float32))
    return folder


def optimize(home: Path, out: str = "out.onnx", **choices: Any) -> Report:
    given = {"data": str(home / "x.npz"), "cache": home / "cache", **choices}
    return onnx_lowrank.optimize(home / "m.onnx", home / out, **given)


def planned(home: Path, **choices: Any) -> Report:
    """With the times of the table, and none measured."""
    return optimize(home, cache=home / "t.json", verify_latency=False, **choices)


def raced(home: Path, out: str = "steep-lr.onnx", **choices: Any) -> Report:
    """The model that gains much, with all its times measured."""
    given = {"data": str(home / "steep.npz"), "cache": home / "cache", **ONE_KIND, **choices}
    return onnx_lowrank.optimize(home / "steep.onnx", home / out, **given)


def test_the_goal_of_a_loss_is_used_up(home: Path) -> None:
    report = planned(home, max_loss=0.05)
    assert report
    assert 0.02 < report.verdict.loss <= 0.05
    assert report.probes["sites"] == report.probes["checked"] == LAYERS
    assert any(point["loss"] is not None for point in report.frontier)


def test_where_probes_are_dear_a_few_sites_are_checked_within_the_budget(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "_MACS", 6.0 * LAYERS * WIDTH**2 * ROWS)  # four probes of three samples
    stages: list[str] = []
    report = planned(home, max_loss=0.05, progress=lambda stage, *_: stages.append(stage))
    assert report
    assert report.probes == {"sites": LAYERS, "checked": 1, "runs": 12, "samples": 3, "not_linear": []}
    (told,) = {stage for stage in stages if stage.startswith("probe")}
    assert told.startswith("probe: up to 12 runs on 3 samples, about ")
    assert "probe" in report.seconds


def test_within_the_loss_the_saved_file_is_measured_to_be_faster(home: Path) -> None:
    report = raced(home, max_loss=0.05)
    assert report
    assert report.verdict.loss <= 0.05
    assert report.verdict.speedup.low > 1
    assert report.additivity["measured_ms"] > 0


def test_the_goal_of_a_speed_costs_no_more_loss_than_it_must(home: Path) -> None:
    slow, fast = raced(home, "s.onnx", speedup=1.2), raced(home, "f.onnx", speedup=2.5)
    assert slow.verdict.loss_limit is None
    assert slow.verdict.loss < fast.verdict.loss
    assert fast.verdict.speedup.value > slow.verdict.speedup.value


def test_a_speed_that_is_not_reached_is_a_warning(home: Path) -> None:
    report = optimize(home, speedup=1000.0)
    assert any("no plan reaches speed-up 1000" in warning for warning in report.warnings)


def test_the_goal_of_a_size_is_reached(home: Path) -> None:
    report = planned(home, size=0.5)
    assert report.after.parameters <= 0.5 * report.before.parameters + WIDTH
    assert report.after.parameters > 0.4 * report.before.parameters  # and not smaller than it must be


def test_another_metric_has_its_own_limit(home: Path) -> None:
    (home / "metric.py").write_text("def worst(a, b):\n    return max(abs(a[n] - b[n]).max() for n in a)\n")
    cosine = optimize(home, metric="cosine", max_drop=0.02)
    assert cosine.verdict.metric == "cosine"
    assert cosine.verdict.loss <= 0.02
    own = optimize(home, metric=f"{home}/metric.py:worst", max_drop=0.5)
    assert own.verdict.loss <= 0.5


@pytest.mark.parametrize(
    "choices",
    [
        {"max_loss": 0.1, "speedup": 2.0},
        {"size": 1.5},
        {"speedup": 0.5},
        {"metric": "cosin"},
        {"metric": "cosine", "max_loss": 0.1},
        {"max_drop": 0.1},
        {"policy": "knapsak"},
        {"size": 0.5, "policy": "uniform"},
        {"metric": "top1", "max_drop": math.nan},
    ],
)
def test_settings_that_contradict_each_other_are_refused(home: Path, choices: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        optimize(home, "refused.onnx", **choices)
    assert not (home / "refused.onnx").exists()


def test_every_policy_makes_a_model_that_holds(home: Path) -> None:
    for policy in ("knapsack", "uniform", "energy", "welore", "greedy", "staircase", "flops"):
        report = optimize(home, policy=policy, max_loss=0.1)
        assert report.verdict.loss <= 0.1
        assert report.plan.policy == policy


def test_a_sweep_is_a_frontier(home: Path) -> None:
    reports = onnx_lowrank.sweep(
        home / "m.onnx", home / "sweep", losses=(0.2, 0.02), data=str(home / "x.npz"), cache=home / "t.json",
        verify_latency=False,
    )  # fmt: skip
    assert [report.verdict.loss_limit for report in reports] == [0.02, 0.2]
    assert all(report.verdict.loss <= (report.verdict.loss_limit or 0) for report in reports)
    assert reports[1].after.parameters < reports[0].after.parameters
    assert sorted(p.name for p in (home / "sweep").iterdir()) == ["m-0.02.onnx", "m-0.2.onnx"]


def apply(report: Report, sibling: Path, out: Path, **choices: Any) -> Report:
    """A plan on a sibling, whose loss is measured, and no time; there has to be something to replay."""
    assert report.plan.rewritten
    return onnx_lowrank.apply(report.plan, sibling, out, verify_latency=False, **choices)


def test_a_plan_is_replayed_on_a_retrained_sibling(home: Path) -> None:
    report = planned(home, max_loss=0.1)
    sibling = save(home / "sibling.onnx", [w + 1e-3 * v for w, v in zip(weights(0), weights(1), strict=True)])
    replayed = apply(report, sibling, home / "sibling-lr.onnx", max_loss=0.2)
    assert replayed.plan.decisions == report.plan.decisions
    assert any("fitted anew" in warning for warning in replayed.warnings)
    assert replayed.verdict.loss != report.verdict.loss


def test_a_plan_is_replayed_on_a_sibling_of_another_type(home: Path) -> None:
    report = planned(home, max_loss=0.1)
    wide = save(home / "wide.onnx", [w.astype(np.float64) for w in weights(0)], onnx.TensorProto.DOUBLE)
    samples = np.random.default_rng(9).standard_normal((16, ROWS, WIDTH))
    data = [{"x": x} for x in samples[:, None]]
    replayed = apply(report, wide, home / "wide-lr.onnx", data=data, max_loss=0.2)
    assert replayed
    kinds = {t.data_type for t in onnx.load(home / "wide-lr.onnx").graph.initializer}
    assert kinds == {onnx.TensorProto.DOUBLE}


def alike(distance: float) -> list[npt.NDArray[np.float32]]:
    """Weights whose first two outputs are alike but for a distance, and the last two: pivots amplify the rounding."""
    found = weights(0)
    for w in found:
        for one, other in ((0, 1), (-1, -2)):
            w[:, other] = w[:, one] + distance * w[:, other]
    return found


@pytest.mark.parametrize(
    ("kind", "distance", "holds"), [("svd", 2e-3, True), ("pivot", 1.0, True), ("pivot", 2e-3, False)]
)
def test_a_plan_on_a_float16_sibling_is_held_to_its_measured_loss(
    home: Path, kind: str, distance: float, holds: bool
) -> None:
    """`optimize` takes few pivots in float16; those of a plan are replayed, and refused where rounding costs much."""
    arrays = alike(distance)
    model = save(home / "full.onnx", arrays)
    half = save(home / "half.onnx", [w.astype(np.float16) for w in arrays], onnx.TensorProto.FLOAT16)
    made: dict[str, Any] = {"data": str(home / "x.npz"), "cache": home / "t.json", "verify_latency": False}
    report = onnx_lowrank.optimize(model, home / "full-lr.onnx", kinds=(kind,), max_loss=0.1, refit=False, **made)
    data = [{"x": x} for x in np.load(home / "x.npz")["x"][:, None].astype(np.float16)]
    assert {d.kind for d in report.plan.rewritten} == {kind}
    out, limit = home / f"{kind}-{distance}-lr.onnx", 1.1 * report.verdict.loss
    if not holds:
        with pytest.raises(VerificationError, match=r"^the rewritten model has loss .*; nothing was written, run .*$"):
            apply(report, half, out, data=data, max_loss=limit)
        assert not out.exists()
        return
    replayed = apply(report, half, out, data=data, max_loss=limit)
    assert replayed.verdict.loss == pytest.approx(report.verdict.loss, rel=0.01)
    assert {t.data_type for t in onnx.load(out).graph.initializer} == {onnx.TensorProto.FLOAT16}


def test_a_plan_that_does_not_hold_on_a_sibling_writes_nothing(home: Path) -> None:
    report = planned(home, max_loss=0.05)
    other = save(home / "flat.onnx", [np.linalg.qr(w)[0].astype(np.float32) * 3 for w in weights(2)])
    with pytest.raises(VerificationError, match="has loss"):
        apply(report, other, home / "none.onnx")
    assert not (home / "none.onnx").exists()


def test_several_shapes_are_timed_and_reported(home: Path) -> None:
    shapes = ({"x": (1, ROWS, WIDE)}, {"x": (4, ROWS, WIDE)})
    report = raced(home, shapes=shapes, max_loss=0.1)
    assert [entry.shape["x"][0] for entry in report.latency[:2]] == [1, 4]
    assert report.verdict.speedup.low == min(entry.ratio.low for entry in report.latency[:2])


def test_a_warm_cache_times_nothing_again_and_gives_the_same_plan(home: Path) -> None:
    given: dict[str, Any] = {"data": str(home / "steep.npz"), "cache": home / "cache", "max_loss": 0.03, **ONE_KIND}
    first = onnx_lowrank.analyze(home / "steep.onnx", **given)
    assert first.plan.rewritten
    before = {p.name: p.read_bytes() for p in (home / "cache").iterdir()}
    again = onnx_lowrank.analyze(home / "steep.onnx", **given)
    assert again.plan == first.plan
    assert {p.name: p.read_bytes() for p in (home / "cache").iterdir()} == before


def test_another_machines_table_decides_without_timing(home: Path) -> None:
    given: dict[str, Any] = {"data": str(home / "steep.npz"), "max_loss": 0.1, **ONE_KIND}
    onnx_lowrank.analyze(home / "steep.onnx", cache=home / "cache", **given)
    cache.export(home / "cache", home / "table.json")
    environment, rows = read_table(home / "table.json")
    report = onnx_lowrank.analyze(home / "steep.onnx", cache=home / "table.json", **given)
    assert report.plan.rewritten
    assert read_table(home / "table.json") == (environment, rows)
    assert any("latencies are those of" in warning for warning in report.warnings)
