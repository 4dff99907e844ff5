"""The fusion guard: what is lost, whose rewrite took it apart, and what runs in its place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from onnx_lowrank import guard, planning, profiles, wholes
from onnx_lowrank.allocate import Candidate, Choices
from onnx_lowrank.graph import Graph
from onnx_lowrank.guard import Losses, attributed, losses
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.plan import Decision
from onnx_lowrank.profiles import Profile
from onnx_lowrank.run import Clock, Run, latency_table, start
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Why

TEXT = """<ir_version: 8, opset_import: ["" : 17]> g (float[n,2] x) => (float[n,2] z)
<float[2,2] a = {1,2,3,4}, float[2,2] b = {1,2,3,4}, float[2,2] d = {1,2,3,4}, float[2,2] e = {1,2,3,4}> {
q = MatMul(x, a) k = MatMul(x, b) t = Transpose(k) s = MatMul(q, t) p = Softmax(s)
r = Relu(p) u = Tanh(r) o = MatMul(u, d) z = MatMul(o, e) }"""
OWN = {f"{n.op_type} → {n.output[0]}": n.op_type for n in onnx.parser.parse_model(TEXT).graph.node}
PLAIN = dict.fromkeys(OWN, 1.0)
FUSED = {name: ms for name, ms in PLAIN.items() if name not in ("Transpose → t", "MatMul → s", "Softmax → p")}


def profile(ms: dict[str, float], **ops: str) -> Profile:
    """Nodes of the model; those in `ops` ran as another operator, by what they make."""
    ran = {name: ops.get(name.rpartition(" ")[2], OWN.get(name, "")) for name in ms}
    return Profile(ms, ran, {name: name for name in OWN}, OWN)


def found(before: Profile, after: Profile, *rewritten: str) -> Losses:
    graph = Graph(onnx.parser.parse_model(TEXT), Path())
    return attributed(graph, [s for s in survey(graph).sites if s.name in rewritten], before, after)


def test_what_runs_in_place_of_a_fusion_is_shared_by_the_sites_next_to_it() -> None:
    before = profile(FUSED | {"MatMul → s": 0.5}, s="Attention")
    lost = found(before, profile(PLAIN), "q", "k", "z")
    assert lost.fusions == (("Attention", "MatMul → s"),)
    assert lost.ms == {"q": pytest.approx(1.25), "k": pytest.approx(1.25)}  # 3 nodes of 1 ms for one of 0.5, and not z


def test_only_rewritten_sites_are_blamed() -> None:
    before = profile(FUSED | {"MatMul → s": 0.5}, s="Attention")
    assert found(before, profile(PLAIN), "z") == Losses((("Attention", "MatMul → s"),))
    assert found(before, profile(PLAIN)) == Losses((("Attention", "MatMul → s"),))


def test_nothing_is_lost_where_everything_is_still_fused() -> None:
    same = profile(FUSED | {"MatMul → s": 0.5}, s="Attention")
    assert found(same, same, "q", "k") == Losses()


def test_a_fusion_that_was_slower_than_its_parts_costs_nothing() -> None:
    before = profile(FUSED | {"MatMul → s": 9.0}, s="Attention")
    assert found(before, profile(PLAIN), "q").ms == {"q": 0.0}


def test_time_of_the_site_itself_is_left_to_its_own_profile() -> None:
    before = profile(PLAIN | {"MatMul → q": 0.5}, q="FusedGemm")
    after = profile(PLAIN | {"MatMul → q": 7.0})
    assert found(before, after, "q") == Losses((("FusedGemm", "MatMul → q"),), {"q": 0.0})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Convolutions along a line, each with its ReLU: the runtime makes FusedConv of them.

    The line is long, so that a ReLU of its own takes many of the whole microseconds that a profile counts.
    """
    folder = tmp_path_factory.mktemp("guard")
    rng, nodes, tensors, name = np.random.default_rng(0), [], [], "x"
    for i in range(2):
        weight = rng.standard_normal((24, 24, 3)) / 9
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("Conv", [name, f"w{i}"], [f"c{i}"], name=f"conv{i}", pads=[1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"], name=f"relu{i}"))
        name = f"r{i}"
    ends = (helper.make_tensor_value_info(n, 1, [1, 24, 16384]) for n in ("x", name))
    graph = helper.make_graph(nodes, "line", [next(ends)], [next(ends)], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m.onnx")
    data = [{"x": rng.standard_normal((1, 24, 16384)).astype(np.float32)} for _ in range(6)]
    return start(folder / "m.onnx", data, Settings(cache=folder / "cache"), Clock(lambda *_: None))


def test_the_runtimes_own_fusion_is_seen_to_be_lost(run: Run) -> None:
    """A `pivot` ends in a Concat, so that the ReLU behind it is no longer part of a convolution."""
    plan = (Decision("conv0", "Conv", (24, 72), "pivot", 8), Decision("conv1", "Conv", (24, 72)))
    lost = losses(run, plan)
    assert lost.fusions == (("FusedConv", "conv0"),)
    assert set(lost.ms) == {"conv0"}
    assert lost.ms["conv0"] > 0
    kept = (dataclasses.replace(plan[0], kind="conv_svd"), plan[1])
    assert losses(run, kept) == Losses()


def test_a_warm_table_tells_the_same_without_a_profile(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = (Decision("conv0", "Conv", (24, 72), "pivot", 12), Decision("conv1", "Conv", (24, 72)))
    first = losses(run, plan)
    assert first.ms["conv0"] > 0

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("profiled")

    monkeypatch.setattr(profiles, "profile_model", never)
    assert losses(dataclasses.replace(run, table=latency_table(run.settings)), plan) == first
    with pytest.raises(AssertionError, match="profiled"):
        losses(run, (dataclasses.replace(plan[0], rank=13), plan[1]))


def test_losses_are_read_as_they_were_kept() -> None:
    """Names with spaces, in an order that is not that of their labels."""
    some = Losses(
        (("LayerNorm", "b → c"), ("Attention", "MatMul → s"), ("Attention", "a b")), {"b → c": 0.25, "q": 0.0}
    )
    assert Losses.read(dict(sorted(some.row().items()))) == some
    assert Losses.read(Losses().row()) == Losses()


def test_no_profile_no_losses(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "MOST_BYTES", 10)
    assert losses(run, (Decision("conv0", "Conv", (24, 72), "pivot", 9),)) == Losses()


@pytest.mark.parametrize(("cost", "kept"), [(0.0, "pivot"), (5.0, None)])
def test_a_plan_that_loses_a_fusion_is_chosen_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, cost: float, kept: str | None
) -> None:
    """The parts fit the whole, so that nothing but the guard corrects anything."""
    dense = Decision("conv0", "Conv", (24, 72), ms_before=10.0)
    choices = [Choices(dense, (Candidate("pivot", 8, 0.001, 6.0, 0.001),), ())]
    monkeypatch.setattr(guard, "losses", lambda *_: Losses((("FusedConv", "conv0"),), {"conv0": cost} if cost else {}))
    monkeypatch.setattr(wholes, "factors", lambda *_: {"conv0": (1.0, 1.0), "conv1": (9.0, 9.0)})
    monkeypatch.setattr(wholes, "whole", lambda *_: {"before": 10.0, "after": 6.0})
    monkeypatch.setattr(Run, "loss_of", lambda *_: 0.001)
    found = planning._additive(run, choices, planning._reach(run, choices))
    assert [d.kind for d in found] == [kept]
    assert found[0].why is (None if kept else Why.NOT_FASTER)
