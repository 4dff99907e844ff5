"""Branches that are always taken: opened, closed to the same bytes, rewritten inside, the other one untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

import onnx_lowrank
from onnx_lowrank.borders import result
from onnx_lowrank.branches import Opening, candidates
from onnx_lowrank.chains import disjoint_chains
from onnx_lowrank.conditions import agreed_by_all
from onnx_lowrank.consumers import readers
from onnx_lowrank.graph import Graph
from onnx_lowrank.measure import parameters
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.protos import BORDER, subgraphs
from onnx_lowrank.runtime import Session
from onnx_lowrank.sites import Why
from tests.test_graph_property import EPS, QUICK, full_rank, magnitudes, models, roundings, run

SHAPES = {"w": (6, 5), "v": (6, 5), "u": (6, 6), "b": (5,), "inner": (6, 5)}
HEAD = "(float[n,6] x, bool c) => (float[n,5] y)"
ELSE = "else_branch = two () => (float[n,5] q) { q = MatMul(x, v) }>"
MODELS = {
    "a weight from outside": f"y = If (c) <then_branch = one () => (float[n,5] o) {{ o = MatMul(x, w) }}, {ELSE}",
    "a weight inside": f"y = If (c) <then_branch = one () => (float[n,5] o) {{ o = MatMul(x, inner) }}, {ELSE}",
    "nodes before, inside and after": "r = Relu(x) z = If (c) <then_branch = one () => (float[n,5] o) "
    f"{{ m = MatMul(r, w) a = Add(m, b) o = Tanh(a) }}, {ELSE} y = Neg(z)",
    "a branch in a branch": "y = If (c) <then_branch = one () => (float[n,5] o) { k = Not(c) h = Not(k) "
    "m = MatMul(x, u) o = If (h) <then_branch = deep () => (float[n,5] e) { e = MatMul(m, w) }, "
    f"else_branch = never () => (float[n,5] f) {{ f = MatMul(m, v) }}> }}, {ELSE}",
    "two of them": "z = If (c) <then_branch = one () => (float[n,6] o) { o = MatMul(x, u) }, "
    "else_branch = two () => (float[n,6] q) { q = Relu(x) }> y = If (c) <then_branch = three () => (float[n,5] s) "
    "{ a = Abs(z) s = MatMul(a, w) }, else_branch = four () => (float[n,5] t) { t = MatMul(z, v) }>",
    "two results": "y, z = If (c) <then_branch = one () => (float[n,5] o, float[n,6] i) { o = MatMul(x, w) "
    "i = Identity(x) }, else_branch = two () => (float[n,5] q, float[n,6] s) { q = MatMul(x, v) s = Neg(x) }>",
}
SITES = {"a branch in a branch": 2, "two of them": 2}
each = pytest.mark.parametrize("name", MODELS)


def model_of(body: str, head: str = HEAD, ir: int = 8) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : 17]> g {head} {{ {body} }}')
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    rng = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        value = numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        if name in words:
            place = next(subgraphs(model.graph.node[0])) if name == "inner" else model.graph
            place.initializer.append(value)
    return model


def feed(taken: bool) -> dict[str, npt.NDArray[Any]]:
    return {"x": np.random.default_rng(1).standard_normal((7, 6)).astype(np.float32), "c": np.array(taken)}


def opened(model: onnx.ModelProto) -> Opening:
    return agreed_by_all(model, Path(), ([feed(True)] * 2,), "cpu")


def then(model: onnx.ModelProto) -> onnx.GraphProto:
    return next(subgraphs(next(n for n in model.graph.node if n.op_type == "If")))


def all_graphs(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    found = [model.graph]
    for graph in found:
        found += [body for node in graph.node for body in subgraphs(node)]
    return found


@each
def test_an_opened_model_computes_the_same_and_is_closed_to_the_same_bytes(name: str) -> None:
    model = model_of(MODELS[name])
    before = model.SerializeToString()
    found = opened(model)
    assert len(found.taken) == SITES.get(name, 1)
    assert candidates(found.flat) == []
    for y, z in zip(Session(model).run(feed(True)), Session(found.flat).run(feed(True)), strict=True):
        assert np.array_equal(y, z)
    assert found.closed(found.flat).SerializeToString() == before == model.SerializeToString()
    assert found.of(model).flat == found.flat


@each
def test_sites_are_rewritten_inside_their_branch(name: str) -> None:
    model = model_of(MODELS[name])
    found = opened(model)
    graph = Graph(found.flat, Path())
    sites = survey(graph).sites
    assert len(sites) == SITES.get(name, 1)
    for site in sites:
        graph.apply(full_rank(site))
    after = found.closed(graph.commit())
    onnx.checker.check_model(after, full_check=True)
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in model.graph.node]
    names = {n.name for graph in all_graphs(after) for n in graph.node}
    assert {f"{site.name}/{part}" for site in sites for part in ("down", "up")} <= names
    assert not any(name.startswith(BORDER) for name in names)
    assert {t.name for t in after.graph.initializer} <= {t.name for t in model.graph.initializer}
    others = [list(subgraphs(n))[1] for m in (model, after) for n in m.graph.node if n.op_type == "If"]
    half = len(others) // 2
    assert [o.SerializeToString() for o in others[:half]] == [o.SerializeToString() for o in others[half:]]
    for taken, tolerance in ((True, 1e-5), (False, 0.0)):
        for y, z in zip(Session(model).run(feed(taken)), Session(after).run(feed(taken)), strict=True):
            assert np.abs(y - z).max() <= tolerance * np.abs(y).max()


@QUICK
@given(models(), st.booleans(), st.integers(0, 2**32 - 1))
def test_random_models_survive_opening_and_closing(model: onnx.ModelProto, choice: bool, seed: int) -> None:
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    found = Opening.none(model)
    for node in candidates(model):
        found = found.further((result(node), choice))
    assert found.closed(found.flat).SerializeToString() == model.SerializeToString()
    graph = Graph(found.flat, Path())
    for site in survey(graph).sites:
        graph.apply(full_rank(site))
    after = found.closed(graph.commit())
    onnx.checker.check_model(after, full_check=True)
    for taken in (choice, not choice):
        given_ = {"x": x, "choice": np.array(taken)}
        bound = run(magnitudes(after), {**given_, "x": np.abs(x)})
        for expected, made, magnitude in zip(run(model, given_), run(after, given_), bound, strict=True):
            assert np.all(np.abs(expected - made) <= EPS * roundings(after) * magnitude)


# Nothing reaches over the border


def surveyed(body: str, head: str = HEAD) -> tuple[Graph, Any]:
    graph = Graph(opened(model_of(body, head)).flat, Path())
    return graph, survey(graph)


def test_a_bias_on_the_other_side_is_not_folded() -> None:
    _, found = surveyed(
        "m = MatMul(x, w) y = If (c) <then_branch = one () => (float[n,5] o) { a = Add(m, b) t = MatMul(x, v) "
        "o = Add(a, t) }, else_branch = two () => (float[n,5] q) { q = Relu(m) }>"
    )
    assert [len(site.nodes) for site in found.sites] == [1, 1]
    _, found = surveyed(
        f"z = If (c) <then_branch = one () => (float[n,5] o) {{ o = MatMul(x, w) }}, {ELSE} y = Add(z, b)"
    )
    assert [len(site.nodes) for site in found.sites] == [1]


def test_a_layer_does_not_reach_over_it_and_the_metric_is_plain_there() -> None:
    graph, found = surveyed(
        "h = MatMul(x, u) r = Relu(h) y = If (c) <then_branch = one () => (float[n,5] o) { o = MatMul(r, w) }, "
        "else_branch = two () => (float[n,5] q) { q = MatMul(h, v) }>"
    )
    assert len(found.sites) == 2
    assert disjoint_chains(graph, found.sites) == ()
    assert readers(graph, found.sites[0], {s.nodes[0]: s for s in found.sites}) == ()


def test_a_weight_of_both_branches_stays() -> None:
    _, found = surveyed(f"y = If (c) <then_branch = one () => (float[n,5] o) {{ o = MatMul(x, v) }}, {ELSE}")
    assert found.sites == ()
    assert Why.IN_BODY in {keep.why for keep in found.kept}


def test_a_weight_of_a_branch_and_of_the_main_graph_is_one_site_whose_factors_lie_outside() -> None:
    model = model_of(f"{MODELS['a weight from outside'].replace('y =', 'z =')} s = MatMul(x, w) y = Add(z, s)")
    found = opened(model)
    graph = Graph(found.flat, Path())
    (site,) = survey(graph).sites
    assert len(site.places) == 2
    graph.apply(full_rank(site))
    after = found.closed(graph.commit())
    assert len(then(after).initializer) == 0
    assert {t.name for t in after.graph.initializer} == {"v", "o/down.weight", "o/up.weight"}
    for y, z in zip(Session(model).run(feed(True)), Session(after).run(feed(True)), strict=True):
        assert z == pytest.approx(y, abs=1e-5)


# Which branches


CONDITIONS = {
    "fed": (MODELS["a weight inside"], [True, True], 1),
    "fed, of both values": (MODELS["a weight inside"], [True, False], 0),
    "computed": ("n = Not(c) " + MODELS["a weight inside"].replace("If (c)", "If (n)"), [False], 1),
    "no linear operator": (
        "y = If (c) <then_branch = one () => (float[n,6] o) { o = Relu(x) }, "
        "else_branch = two () => (float[n,6] q) { q = Neg(x) }>", [True], 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONDITIONS)
def test_branches_are_opened_where_every_sample_takes_them(name: str) -> None:
    body, values, count = CONDITIONS[name]
    model = model_of(body) if name != "computed" else model_of(body.replace("inner", "w"))
    assert (
        len(agreed_by_all(model, Path(), ([feed(v) for v in values[:1]], [feed(v) for v in values]), "cpu").taken)
        == count
    )


def test_a_constant_condition_is_known_without_a_run() -> None:
    model = model_of(
        "k = Constant <value = bool {1}> () " + MODELS["a weight from outside"].replace("If (c)", "If (k)")
    )
    assert agreed_by_all(model, Path(), ([feed(False)],), "cpu").taken == (("y", True),)


@pytest.mark.parametrize("why", ["r stands elsewhere too", "y is what the If makes", "constants are listed as inputs"])
def test_a_branch_stays_closed(why: str) -> None:
    if not why.startswith("constants"):
        model = model_of(f"{MODELS['a weight inside']} r = Relu(x)")
        then(model).node[0].output[0] = then(model).output[0].name = why[0]
    else:
        model = model_of(MODELS["a weight inside"], ir=3)
    found = Opening.none(model).further(("y", True))
    assert found.taken == ()
    assert found.closed(found.flat) is model


def test_parameters_of_bodies_count() -> None:
    assert parameters(model_of(MODELS["a weight inside"])) == 30 + 30
    constant = "y = If (c) <then_branch = one () => (float[n,5] o) { k = Constant <value = float[5] {1,2,3,4,5}> () "
    assert parameters(model_of(f"{constant} m = MatMul(x, w) o = Add(m, k) }}, {ELSE}")) == 30 + 30 + 5


# The whole journey


WIDTH = 512


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight of rank 16 in a branch, another in the branch that no sample takes, samples, and a table of times."""
    folder = tmp_path_factory.mktemp("branches")
    rng = np.random.default_rng(0)
    head = f"(float[n,{WIDTH}] x, bool c) => (float[n,{WIDTH}] y)"
    text = (
        f"z = If (c) <then_branch = one () => (float[n,{WIDTH}] o) {{ m = MatMul(x, low) o = Tanh(m) }}, "
        f"else_branch = two () => (float[n,{WIDTH}] q) {{ q = MatMul(x, other) }}> y = Neg(z)"
    )
    model = model_of(text, head)
    for name in ("low", "other"):
        weight = rng.standard_normal((WIDTH, 16)) @ rng.standard_normal((16, WIDTH)) / WIDTH
        model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), name))
    onnx.save(model, folder / "m.onnx")
    x = rng.standard_normal((16, 64, WIDTH)).astype(np.float32)
    np.savez(folder / "x.npz", x=x, c=np.ones(16, bool))
    np.savez(folder / "both.npz", x=x, c=np.arange(16) % 2 == 0)
    row = {"dense": 0.050, "dense again": 0.0502, "svd 16": 0.020, "svd 32": 0.0201, "svd 128": 0.060}
    rows = {f"MatMul {WIDTH}x{WIDTH} float32 x=64x{WIDTH} bias=0 right": row}
    environment = {"processor": "a processor", "provider": "cpu", "threads": 1}
    (folder / "t.json").write_text(json.dumps({"environment": environment, "ms": rows}))
    return folder


def test_a_branch_is_optimised_and_replayed_to_the_byte(home: Path) -> None:
    given_: dict[str, Any] = {"data": home / "x.npz", "cache": home / "t.json", "verify_latency": False}
    report = onnx_lowrank.optimize(home / "m.onnx", home / "out.onnx", **given_)
    assert [(d.node, d.kind, d.rank) for d in report.plan.decisions] == [("m", "svd", 32)]
    assert (report.before.parameters, report.after.parameters) == (2 * WIDTH**2, WIDTH**2 + 2 * 32 * WIDTH)
    assert report.after.macs == pytest.approx(report.before.macs * 2 * 32 / WIDTH)
    assert report.to_dict()["kept"][Why.NOT_EXECUTED.value] == 1
    before, after = (onnx.load(home / name) for name in ("m.onnx", "out.onnx"))
    assert [t.name for t in after.graph.initializer] == ["other"]
    assert sorted(t.name for t in then(after).initializer) == ["m/down.weight", "m/up.weight"]
    other = {"x": np.ones((3, WIDTH), np.float32), "c": np.array(False)}
    assert np.array_equal(Session(before).run(other)[0], Session(after).run(other)[0])
    onnx_lowrank.apply(report.plan, home / "m.onnx", home / "again.onnx", **given_)
    assert (home / "again.onnx").read_bytes() == (home / "out.onnx").read_bytes()


def test_branches_that_samples_disagree_on_stay_as_they_are(home: Path) -> None:
    report = onnx_lowrank.optimize(
        home / "m.onnx", home / "same.onnx", data=home / "both.npz", cache=home / "t.json", verify_latency=False
    )
    assert report.plan.decisions == ()
    assert report.to_dict()["kept"][Why.SUBGRAPH.value] == 3
    assert (home / "same.onnx").read_bytes() == (home / "m.onnx").read_bytes()
