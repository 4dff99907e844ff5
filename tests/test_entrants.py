"""What a comparison measures beside the clock: samples in every shape, where nodes ran. The races are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import data, hardware, measure
from onnx_lowrank.compare import compare
from onnx_lowrank.errors import ModelError
from onnx_lowrank.html import html
from onnx_lowrank.measure import Latency
from onnx_lowrank.placement import Placement
from onnx_lowrank.providers import Provider
from onnx_lowrank.runtime import load
from onnx_lowrank.timing import Ratio
from tests.test_compare import save
from tests.test_html import Page

TWICE = Ratio(2.0, 1.9, 2.1)
SHAPES = ({"x": (2, 4)}, {"x": (5, 4)})
NOT_THE_CPU = "AzureExecutionProvider"
"""In every build of the runtime for processors; it has no kernel for any operator of a model."""


@pytest.fixture(autouse=True)
def _given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model takes half the time of the first."""

    def race(models: Sequence[Path], feed: Any, *, provider: str, threads: int, **_: Any) -> list[Latency]:
        shape = {name: list(array.shape) for name, array in feed.items()}
        sides = ({"runs": 1, "p50_ms": 2.0}, {"runs": 1, "p50_ms": 1.0})
        one = Latency(shape, "wall", threads, *sides, ratio=TWICE, aa=Ratio(1.0, 0.99, 1.01), provider=str(provider))
        return [one] * (len(models) - 1)

    monkeypatch.setattr(measure, "race", race)


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [save(tmp_path / "one.onnx"), save(tmp_path / "two.onnx", 1.01)]


def only_two_rows(path: Path) -> Path:
    """A model that runs on inputs of two rows alone, though it says that it takes any number."""
    model = onnx.load(path)
    model.graph.node[0].output[0] = "t"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 4]), "s"))
    model.graph.node.append(onnx.helper.make_node("Reshape", ["t", "s"], ["y"]))
    onnx.save(model, path)
    return path


def test_without_data_every_shape_has_its_samples(pair: list[Path]) -> None:
    both = compare(pair, shapes=SHAPES).to_dict()
    assert both["samples"] == len(both["models"][1]["sample_losses"]) == 2 * 16
    assert both["models"][1]["loss"] == pytest.approx(1e-4, rel=1e-3)
    assert {row["samples"] for row in both["accuracy"] if row["model"] == "two.onnx"} == {32}
    few = compare(pair, shapes=SHAPES, samples=6, brief=True).to_dict()
    assert few["samples"] == 6
    one = compare(pair, shapes=SHAPES[:1], brief=True).to_dict()
    assert one["samples"] == 16
    prints = {found["sample_fingerprint"]["sha256"] for found in (both, few, one)}
    assert len(prints) == 3


def test_the_fingerprint_is_that_of_the_samples(pair: list[Path]) -> None:
    def of(**choices: Any) -> dict[str, Any]:
        return dict(compare(pair, brief=True, **choices).to_dict()["sample_fingerprint"])

    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((2, 4)).astype(np.float32)} for _ in range(4)]
    assert of(data=samples) == of(data=samples, seed=7, shapes=SHAPES) == of(data=samples)
    assert of(data=samples)["count"] == 4
    assert of(data=samples) != of(data=samples[::-1])
    assert of(data=samples, samples=3)["count"] == 3
    assert of() == of() != of(seed=1)


def test_a_shape_that_a_model_does_not_run_on_is_left_out_of_its_loss(pair: list[Path]) -> None:
    only_two_rows(pair[1])
    found = compare(pair, shapes=SHAPES, brief=True).to_dict()
    assert found["samples"] == 32
    assert len(found["models"][1]["sample_losses"]) == 16
    assert found["models"][1]["error"] is None
    assert any("two.onnx is without x 5×4" in w for w in found["warnings"])
    assert [way["shape"]["x"] for way in found["untimed"]] == [[5, 4]]
    turned = compare(pair[::-1], shapes=SHAPES, brief=True).to_dict()
    assert turned["samples"] == 16
    assert [way["shape"]["x"] for way in turned["configurations"]] == [[2, 4]]
    with pytest.raises(ModelError, match="no model could be run"):
        compare([pair[1], pair[1]], shapes=({"x": (3, 4)}, {"x": (5, 4)}), brief=True)


def test_samples_are_taken_in_turn() -> None:
    sources = [data.Source(f"{i}", True, lambda i=i: iter([{"x": 10 * i}, {"x": 10 * i + 1}])) for i in range(2)]  # type: ignore[misc]
    assert [sample["x"] for sample in data.turn_about(sources)] == [0, 10, 1, 11]
    assert data.turn_about(sources[:1]) is sources[0]


def test_ways_that_this_machine_lacks_are_kept(pair: list[Path]) -> None:
    found = compare(pair, provider=["cpu", "dml"], threads=[1, 2], brief=True).to_dict()
    assert [(way["provider"], way["threads"]) for way in found["untimed"]] == [("dml", 1), ("dml", 2)]
    assert "fallback" not in found["environment"]


@pytest.mark.skipif(NOT_THE_CPU not in load().get_available_providers(), reason="another build of the runtime")
def test_nodes_that_fell_back_to_the_cpu_are_named(pair: list[Path]) -> None:
    found = compare(pair, provider=["cpu", NOT_THE_CPU], threads=[1, 2], shapes=SHAPES, brief=True).to_dict()
    rows = found["environment"]["fallback"]
    assert [(row["model"], row["provider"], row["op"]) for row in rows] == [
        ("one.onnx", NOT_THE_CPU, "MatMul"),
        ("two.onnx", NOT_THE_CPU, "MatMul"),
    ]
    said = [w for w in found["warnings"] if "do not run on" in w]
    assert [w.partition(" (")[0] for w in said] == [
        f"one.onnx: 1 nodes do not run on {NOT_THE_CPU}",
        f"two.onnx: 1 nodes do not run on {NOT_THE_CPU}",
    ]
    shown = Page(html(found)).rows("fallback")
    assert [cells[0][0] for cells in shown] == ["one.onnx", "two.onnx"]


def test_placement_is_looked_at_once_for_each_provider_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    feeds = [{"x": np.zeros((rows, 4), np.float32)} for rows in (2, 5)]
    answers = {2: ["a"], 5: ["a", "b"]}

    def placed(_: Path, feed: Any, __: Path, *, provider: str, threads: int) -> tuple[Placement, ...]:
        rows = len(feed["x"])
        seen.append((Provider.of(provider).short, threads * 10 + rows))
        return tuple(Placement(name, "Det", "CPUExecutionProvider", "no kernel", 1.0) for name in answers[rows])

    monkeypatch.setattr(hardware, "placed", placed)
    ways = [(p, n, feed) for p in ("cpu", "cuda", Provider("cuda", here=False)) for n in (1, 2) for feed in feeds]
    warnings: list[str] = []
    rows = hardware.left_out("m.onnx", Path("m.onnx"), ways, lambda _, part: part(), warnings)
    assert seen == [("cuda", 12), ("cuda", 15)]
    assert [(row["model"], row["provider"], row["node"]) for row in rows] == [
        ("m.onnx", "cuda", "a"),
        ("m.onnx", "cuda", "b"),
    ]
    assert [w.partition(" (")[0] for w in warnings] == [
        "m.onnx: 1 nodes do not run on cuda",
        "m.onnx: 2 nodes do not run on cuda",
    ]
