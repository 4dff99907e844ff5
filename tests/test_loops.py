"""Loop and Scan: unrolled, closed to the same bytes, rewritten inside, one site for all runs of a weight."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import onnx_lowrank
from onnx_lowrank.branches import Opening, candidates
from onnx_lowrank.chains import disjoint_chains
from onnx_lowrank.conditions import agreed_by_all
from onnx_lowrank.consumers import readers
from onnx_lowrank.errors import PassError, SettingsError
from onnx_lowrank.graph import Graph
from onnx_lowrank.passes.survey import Survey, survey
from onnx_lowrank.protos import BORDER, all_names, subgraphs
from onnx_lowrank.rewrite import patch_of
from onnx_lowrank.runtime import Session
from onnx_lowrank.sites import Site, Why
from tests.saved import ROW, save_table
from tests.test_graph_property import QUICK, full_rank

Feed = dict[str, npt.NDArray[Any]]
SHAPES = {"w": (6, 6), "v": (6, 5), "vt": (5, 6), "b": (6,), "own": (6, 6), "ownb": (6,), "zero": (4, 6)}
HEAD = "(float[4,6] x, int64 m, bool t) => (float[4,6] y)"
STACKED = "(float[4,6] x, int64 m, bool t) => (float[4,6] y, float[k,4,5] z)"
SCANNED = "(float[4,6] x, float[k,4,6] s) => (float[4,6] y, float[k,4,5] z)"
LOOP = "{y} = Loop ({m}, {t}, {x}) <body = one (int64 i, bool c, float[4,6] h) => (bool d, float[4,6] o) {{ {body} }}>"


def loop(body: str, m: str = "m", t: str = "t", x: str = "x", y: str = "y") -> str:
    return LOOP.format(m=m, t=t, x=x, y=y, body=body)


def scan(body: str, attributes: str = "") -> str:
    states, out = "float[4,6] h, float[4,6] a", "float[4,6] o, float[4,5] q"
    return f"y, z = Scan (x, s) <num_scan_inputs = 1{attributes}, body = one ({states}) => ({out}) {{ {body} }}>"


GO = "d = Identity(c)"
STEP = f"{GO} k = MatMul(h, w) o = Tanh(k)"
SCAN = "p = MatMul(h, w) g = Add(p, a) o = Tanh(g) q = MatMul(o, v)"
MODELS = {
    "a weight from outside": (HEAD, loop(STEP)),
    "a weight inside": (HEAD, loop(STEP.replace("w)", "own)"))),
    "a constant node inside": (HEAD, loop(f"{GO} n = Constant <value = float[6] {{1,2,3,4,5,6}}> () "
        "k = MatMul(h, w) a = Add(k, n) o = Tanh(a)")),
    "a turned weight": (HEAD, loop(f"{GO} n = Transpose(w) k = MatMul(h, n) o = Tanh(k)")),
    "a constant trip count": (HEAD, f"n = Constant <value = int64 {{3}}> () {loop(STEP, m='n')}"),
    "no condition": (HEAD, loop(f"d = Constant <value = bool {{1}}> () {STEP.removeprefix(GO)}", t="")),
    "a computed condition": (HEAD, loop(f"n = Constant <value = int64 {{2}}> () d = Less(i, n) "
        f"{STEP.removeprefix(GO)}", m="")),
    "the number of the run": (HEAD, loop(f"{GO} n = Cast <to = 1> (i) k = MatMul(h, w) o = Add(k, n)")),
    "nodes before and after": (HEAD, f"r = Relu(x) {loop(STEP, x='r', y='f')} y = Add(f, b)"),
    "a constant state": (HEAD, loop(f"{GO} k = MatMul(h, w) j = Add(k, h) o = Add(j, x)", x="zero")),
    "a bias": (HEAD, loop(f"{GO} k = MatMul(h, w) o = Add(k, b)")),
    "what does not change": (HEAD, loop(f"{GO} k = MatMul(x, w) o = Add(h, k)")),
    "a state that passes through": (HEAD, f"y, e = Loop (m, t, x, x) <body = one (int64 i, bool c, float[4,6] h, "
        f"float[4,6] g) => (bool d, float[4,6] o, float[4,6] g2) {{ {STEP} g2 = Identity(g) }}>"),
    "stacked": (STACKED, f"y, z = Loop (m, t, x) <body = one (int64 i, bool c, float[4,6] h) => "
        f"(bool d, float[4,6] o, float[4,5] q) {{ {STEP} q = MatMul(o, v) }}>"),
    "scan": (SCANNED, scan(SCAN)),
    "scan backwards": (SCANNED, scan(SCAN, ", scan_input_directions = [1], scan_output_directions = [1]")),
    "scan of the second axis": (SCANNED.replace("[k,4,6]", "[4,k,6]"), scan(SCAN, ", scan_input_axes = [1]")),
    "scan to the last axis": (SCANNED.replace("[k,4,5]", "[4,5,k]"), scan(SCAN, ", scan_output_axes = [-1]")),
    "a loop in a branch": ("(float[4,6] x, int64 m, bool t) => (float[4,6] y)",
        f"y = If (t) <then_branch = two () => (float[4,6] l) {{ {loop(STEP, y='l')} }}, "
        "else_branch = three () => (float[4,6] e) { e = Neg(x) }>"),
    "two of them": (HEAD, f"{loop(STEP, y='f')} y = Loop (m, t, f) <body = four (int64 i2, bool c2, "
        "float[4,6] h2) => (bool d2, float[4,6] o2) { d2 = Identity(c2) k2 = MatMul(h2, w) o2 = Relu(k2) }>"),
}  # fmt: skip
PLACES = {
    "stacked": [3, 3],
    "two of them": [6],
    **{name: [3, 3] for name in MODELS if name.startswith("scan")},
}
"""How often each weight is read, where that is not thrice."""

each = pytest.mark.parametrize("name", MODELS)


def model_of(head: str, text: str, ir: int = 8, opset: int = 17) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : {opset}]> g {head} {{ {text} }}')
    words = text.replace("(", " ").replace(")", " ").replace(",", " ").split()
    rng = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        value = numpy_helper.from_array((rng.standard_normal(shape) / 2).astype(np.float32), name)
        if name in words:
            place = body_of(model) if name.startswith("own") else model.graph
            place.initializer.append(value)
    return model


def body_of(model: onnx.ModelProto) -> onnx.GraphProto:
    """The body of the first Loop or Scan, be it in a branch."""
    graphs = [model.graph]
    for graph in graphs:
        for node in graph.node:
            if node.op_type in ("Loop", "Scan"):
                return next(subgraphs(node))
            graphs += subgraphs(node)
    raise AssertionError("no loop")


def feed_of(model: onnx.ModelProto, count: int = 3, seed: int = 1) -> Feed:
    rng, found = np.random.default_rng(seed), {}
    for value in model.graph.input:
        dims = [d.dim_value or count for d in value.type.tensor_type.shape.dim]
        found[value.name] = rng.standard_normal(dims).astype(np.float32)
    given_ = {"m": np.array(count), "t": np.array(True)}
    return {name: given_.get(name, value) for name, value in found.items()}


def opened(model: onnx.ModelProto, *counts: int) -> Opening:
    return agreed_by_all(model, Path(), ([feed_of(model, count) for count in counts or (3, 3)],), "cpu")


def off(one: onnx.ModelProto, other: onnx.ModelProto, feed: Feed) -> float:
    """Largest difference of two models' outputs, relative to the largest output."""
    runs = (Session(model, optimisations="disable_all").run(feed) for model in (one, other))
    return max(float(np.abs(y - z).max() / np.abs(y).max()) for y, z in zip(*runs, strict=True))


def at_full_rank(found: Opening) -> tuple[list[Site], onnx.ModelProto]:
    """The sites, and the model with all of them rewritten."""
    graph = Graph(found.flat, Path())
    sites = list(survey(graph).sites)
    for site in sites:
        alone = full_rank(dataclasses.replace(site, twins=()))
        graph.apply(patch_of(site, alone.fragment, alone.made_by))
    return sites, found.closed(graph.commit())


@each
def test_an_unrolled_model_computes_the_same_and_is_closed_to_the_same_bytes(name: str) -> None:
    model = model_of(*MODELS[name])
    before = model.SerializeToString()
    found = opened(model)
    assert candidates(found.flat) == []
    assert off(model, found.flat, feed_of(model)) == 0
    assert found.closed(found.flat).SerializeToString() == before == model.SerializeToString()
    assert found.of(model).flat == found.flat


@each
def test_sites_are_rewritten_inside_their_body(name: str) -> None:
    model = model_of(*MODELS[name])
    found = opened(model)
    sites, after = at_full_rank(found)
    assert sorted(len(site.places) for site in sites) == PLACES.get(name, [3])
    onnx.checker.check_model(after, full_check=True)
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in model.graph.node]
    nodes = body_of(after).node
    assert {f"{site.name}/{part}" for site in sites for part in ("down", "up")} <= {n.name for n in nodes}
    assert not any(mark in known for known in all_names(after) for mark in (BORDER, "@"))
    assert {t.name for t in after.graph.initializer if "/" in t.name} == (
        {"k/down.weight", "k/up.weight"} if name == "two of them" else set()
    )
    for count in (3, 5):  # a file that was planned for three runs
        assert off(model, after, feed_of(model, count)) < 1e-5


def test_names_of_a_body_are_those_of_its_first_run() -> None:
    found = opened(model_of(*MODELS["a weight from outside"]))
    (site,) = survey(Graph(found.flat, Path())).sites
    assert [place.name for place in site.places] == ["k", "k@2", "k@3"]
    assert [place.x for place in site.places] == ["h", "h@2", "h@3"]
    assert found.taken == (("y", 3),)
    assert {found.inside()[place.y] for place in site.places} == {"y"}
    assert list(found.untaken()) == []
    assert [found.again(name) for name in ("k", "k@2", "k@2/thin", "k@4")] == [False, True, True, False]


def test_a_constant_of_the_body_is_made_once() -> None:
    for name in ("a constant node inside", "a turned weight"):
        found = opened(model_of(*MODELS[name]))
        assert [n.output[0] for n in found.flat.graph.node if "n" in n.output] == ["n"]
    assert survey(Graph(found.flat, Path())).sites[0].weight.shape == (6, 6)
    _, after = at_full_rank(found)
    assert [n.op_type for n in body_of(after).node] == ["Identity", "MatMul", "MatMul", "Tanh"]


def test_one_run_needs_no_twins() -> None:
    model = model_of(*MODELS["a weight from outside"])
    sites, after = at_full_rank(opened(model, 1))
    assert [len(site.places) for site in sites] == [1]
    assert off(model, after, feed_of(model, 4)) < 1e-5


@pytest.mark.parametrize("opset", [9, 11, 13, 21])
def test_operator_sets_differ_in_how_a_stack_is_made(opset: int) -> None:
    model = model_of(*MODELS["scan backwards"], opset=opset)
    _, after = at_full_rank(opened(model))
    assert off(model, after, feed_of(model)) < 1e-5


# Nothing reaches over the border


def surveyed(head: str, text: str) -> tuple[Graph, Survey]:
    graph = Graph(opened(model_of(head, text)).flat, Path())
    return graph, survey(graph)


def test_what_is_constant_in_the_first_run_alone_is_constant_in_none() -> None:
    """The state starts at zero: h is no bias of the first run, and x·0 no weight."""
    _, found = surveyed(*MODELS["a constant state"])
    assert [len(place.nodes) for place in found.sites[0].places] == [1, 1, 1]
    _, found = surveyed(HEAD, loop(f"{GO} n = Cast <to = 1> (i) k = MatMul(h, w) o = Add(k, n)"))
    assert [len(place.nodes) for place in found.sites[0].places] == [1, 1, 1]


def test_a_bias_of_the_body_is_folded_at_every_run_and_one_behind_the_loop_is_not() -> None:
    _, found = surveyed(*MODELS["a bias"])
    assert [len(place.nodes) for place in found.sites[0].places] == [2, 2, 2]
    _, found = surveyed(HEAD, f"{loop(f'{GO} o = MatMul(h, w)', y='f')} y = Add(f, b)")
    assert [len(place.nodes) for place in found.sites[0].places] == [1, 1, 1]


def test_layers_and_metrics_end_at_the_border() -> None:
    one = "y = Loop (m, t, r) <body = one (int64 i, bool c, float[4,5] h) => (bool d, float[4,5] o) "
    text = f"f = MatMul(x, v) r = Relu(f) {one} {{ {GO} k = MatMul(h, vt) j = Tanh(k) o = MatMul(j, v2) }}>"
    model = model_of(HEAD.replace("[4,6] y", "[4,5] y"), text)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((6, 5), np.float32), "v2"))
    graph = Graph(opened(model, 1).flat, Path())
    sites = survey(graph).sites
    assert [site.name for site in sites] == ["f", "k", "o"]
    at = {site.nodes[0]: site for site in sites}
    assert [[reader.site.name for reader in readers(graph, site, at)] for site in sites] == [[], ["o"], []]
    assert [chain.producer.name for chain in disjoint_chains(graph, sites)] == ["k"]


def test_a_weight_of_the_body_and_of_the_main_graph_is_one_site_whose_factors_lie_outside() -> None:
    text = f"{loop(STEP, y='f')} g = MatMul(x, w) y = Add(f, g)"
    model = model_of(HEAD, text)
    sites, after = at_full_rank(opened(model))
    assert [len(site.places) for site in sites] == [4]
    assert len(body_of(after).initializer) == 0
    assert {t.name for t in after.graph.initializer} == {"k/down.weight", "k/up.weight"}
    assert off(model, after, feed_of(model)) < 1e-5


@pytest.mark.parametrize(
    "text",
    [
        f"{loop(STEP, y='f')} g = Transpose(w) y = MatMul(f, g)",
        loop(f"{GO} k = MatMul(h, w) g = Relu(w) o = MatMul(k, g)"),
        f"y, e = Loop (m, t, x, w) <body = one (int64 i, bool c, float[4,6] h, float[6,6] g) => "
        f"(bool d, float[4,6] o, float[6,6] j) {{ {STEP} j = Tanh(g) }}>",
    ],
    ids=["turned outside", "computed with", "a state too"],
)
def test_a_weight_that_is_read_in_another_way_too_stays(text: str) -> None:
    _, found = surveyed(HEAD, text)
    assert found.sites == ()
    assert {Why.SHARED, Why.IN_BODY} & {keep.why for keep in found.kept}


def test_runs_that_became_different_ones_are_not_closed() -> None:
    found = opened(model_of(*MODELS["a weight from outside"]))
    other = onnx.ModelProto()
    other.CopyFrom(found.flat)
    next(n for n in other.graph.node if n.name == "o@2").op_type = "Sigmoid"
    with pytest.raises(PassError, match="the runs of the body of Loop 'y' became different ones"):
        found.closed(other)


# Which loops


def nested(model: onnx.ModelProto) -> None:
    branch = helper.make_graph([helper.make_node("Relu", ["o"], ["e"])], "deep", [], [onnx.ValueInfoProto(name="e")])
    body = body_of(model)
    body.node.append(helper.make_node("If", ["c"], ["f"], then_branch=branch, else_branch=branch))


def clashing(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", ["x"], ["k@2"]))


def listed(model: onnx.ModelProto) -> None:
    del model.graph.node[0].input[2]


def ranked(model: onnx.ModelProto) -> None:
    """The number of the run as a vector of one: a Gather by it would have one dimension more than by a scalar."""
    body_of(model).input[0].type.tensor_type.shape.dim.add().dim_value = 1


def annotated(model: onnx.ModelProto) -> None:
    body_of(model).quantization_annotation.add().tensor_name = "k"


LEFT_ALONE = {
    "a body with a body": (nested, 3),
    "names that stand elsewhere too": (clashing, 3),
    "inputs that do not fit the body": (listed, 3),
    "no run": (lambda _: None, 0),
    "a number of the run that is a vector": (ranked, 3),
    "quantization annotations": (annotated, 3),
}


@pytest.mark.parametrize("why", LEFT_ALONE)
def test_a_loop_stays_closed(why: str) -> None:
    edit, count = LEFT_ALONE[why]
    model = model_of(*MODELS["a weight from outside"])
    edit(model)
    assert Opening.none(model).further(("y", count)).taken == ()


def test_constants_that_are_inputs_and_an_old_scan_stay_closed() -> None:
    assert Opening.none(model_of(*MODELS["a weight from outside"], ir=3)).further(("y", 3)).taken == ()
    assert Opening.none(model_of(*MODELS["scan"], opset=8)).further(("y", 3)).taken == ()


@pytest.mark.parametrize(("counts", "taken"), [((3, 3), 1), ((3, 4), 0), ((0, 0), 0), ((70, 70), 0)])
def test_loops_are_opened_where_every_sample_runs_them_equally_often(counts: tuple[int, int], taken: int) -> None:
    for name in ("a weight from outside", "scan"):
        assert len(opened(model_of(*MODELS[name]), *counts).taken) == taken


def test_the_same_loops_are_opened_in_a_model_that_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of size hold for what is opened first, not for the rewritten model that is counted afterwards."""
    model = model_of(*MODELS["a weight from outside"])
    found = opened(model)
    monkeypatch.setattr("onnx_lowrank.loops._MOST_NODES", 1)
    assert opened(model).taken == ()
    assert found.of(model).taken == found.taken == (("y", 3),)


def test_a_loop_that_goes_on_until_its_values_say_so_is_counted() -> None:
    """h becomes |x| + h² while it is below 5: twice from 1.5 (3.75, 15.6) and from 1.6, once from 4."""
    below = "n = ReduceMax <keepdims = 0> (o) e = Constant <value = float {5}> () d = Less(n, e)"
    body = f"k = MatMul(h, w) z = Mul(k, h) a = Abs(x) o = Add(a, z) {below}"
    model = model_of(HEAD, loop(body, m=""))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.eye(6, dtype=np.float32), "w"))

    def started(value: float) -> Feed:
        return {**feed_of(model), "x": np.full((4, 6), value, np.float32)}

    found = agreed_by_all(model, Path(), ([started(1.5), started(1.6)],), "cpu")
    assert found.taken == (("y", 2),)
    assert off(model, found.flat, started(1.5)) == 0
    assert agreed_by_all(model, Path(), ([started(1.5), started(4.0)],), "cpu").taken == ()


def test_what_the_runtime_does_not_take_unrolled_stays_closed_alone() -> None:
    """Operator set 13 has no Identity of a sequence, which is a state of one of two loops."""
    kinds = ("int64 i2, bool c2, float[4,6] h2, seq(float[4,6]) e2", "bool d2, float[4,6] o2, seq(float[4,6]) s2")
    inside = "d2 = Identity(c2) o2 = MatMul(h2, w) s2 = SequenceInsert(e2, h2)"
    first = f"e = SequenceEmpty() f, s = Loop (m, t, x, e) <body = two ({kinds[0]}) => ({kinds[1]}) {{ {inside} }}>"
    text = f"{first} {loop(STEP.replace('w)', 'u)'), x='f')}"
    model = model_of(HEAD, text, opset=13)
    model.graph.initializer.append(numpy_helper.from_array(np.eye(6, dtype=np.float32), "u"))
    assert Opening.none(model).further(("f", 3)).further(("y", 3)).taken == (("f", 3), ("y", 3))
    found = opened(model)
    assert found.taken == (("y", 3),)
    assert off(model, found.flat, feed_of(model)) == 0


# Random ones


class Builder:
    """A random Loop or Scan: states, slices and stacks of 3×3, weights wherever they may lie."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.values = rng, np.random.default_rng(rng.getrandbits(32))
        self.nodes: list[onnx.NodeProto] = []
        self.held: list[onnx.TensorProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.count, self.opset = rng.randint(1, 4), rng.choice([11, 13, 17])

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = self.rng.choice(["", f"node {len(self.nodes)}"])
        self.nodes.append(helper.make_node(op, inputs, [f"t{len(self.nodes)}"], name=name, **attributes))
        return str(self.nodes[-1].output[0])

    def weight(self, *shape: int) -> str:
        values = self.values.standard_normal(shape).astype(np.float32) / 2
        form = self.rng.choice(["outer", "own", "constant", "turned", "again"])
        outer = [t.name for t in self.stored if tuple(t.dims) == shape]
        if form == "again" and outer:
            return str(self.rng.choice(outer))
        if form == "constant":
            return self.add("Constant", value=numpy_helper.from_array(values))
        place = self.held if form == "own" else self.stored
        place.append(numpy_helper.from_array(values, f"w{len(self.held)}_{len(self.stored)}"))
        return self.add("Transpose", place[-1].name) if form == "turned" else place[-1].name

    def made_of(self, known: list[str]) -> str:
        x = self.add("MatMul", self.rng.choice(known), self.weight(3, 3))
        if self.rng.random() < 0.3:
            known.append(x)
        other = self.weight(3) if self.rng.random() < 0.4 else self.rng.choice(known)
        return self.add(self.rng.choice(["Tanh", "Identity"]), self.add("Add", x, other))

    def loop(self) -> tuple[onnx.ModelProto, Feed]:
        states = self.rng.randint(1, 2)
        going = self.add("Identity", "c")
        known = [*(f"h{i}" for i in range(states)), "x"]
        if self.rng.random() < 0.5:
            known.append(self.add("Add", "x", self.add("Cast", "i", to=TensorProto.FLOAT)))
        made = [self.made_of(known) for _ in range(states + self.rng.randint(0, 2))]
        own = [value_of("i", TensorProto.INT64), value_of("c", TensorProto.BOOL), *map(value_of, known[:states])]
        body = helper.make_graph(
            self.nodes, "body", own, [value_of(going, TensorProto.BOOL), *map(value_of, made)], self.held
        )
        condition = self.rng.choice(["", "t"])
        node = helper.make_node(
            "Loop", ["m", condition, *["x"] * states], [f"y{i}" for i in range(len(made))], body=body
        )
        return self.model(node, states, {"m": np.array(self.count), "t": np.array(True)})

    def scan(self) -> tuple[onnx.ModelProto, Feed]:
        states, slices, stacks = self.rng.randint(0, 2), self.rng.randint(1, 2), self.rng.randint(1, 2)
        known = [*(f"h{i}" for i in range(states)), *(f"s{i}" for i in range(slices)), "x"]
        made = [self.made_of(known) for _ in range(states + stacks)]
        own = [value_of(name) for name in known[: states + slices]]
        body = helper.make_graph(self.nodes, "body", own, [value_of(name) for name in made], self.held)
        more: dict[str, Any] = {"body": body, "num_scan_inputs": slices}
        for what, count in (("input", slices), ("output", stacks)):
            more[f"scan_{what}_axes"] = [self.rng.randint(-1, 2) for _ in range(count)]
            more[f"scan_{what}_directions"] = [self.rng.randint(0, 1) for _ in range(count)]
        feed: Feed = {}
        for i, axis in enumerate(more["scan_input_axes"]):
            shape = [3, 3]
            shape.insert(axis % 3, self.count)
            feed[f"a{i}"] = self.values.standard_normal(shape).astype(np.float32)
        node = helper.make_node("Scan", [*["x"] * states, *feed], [f"y{i}" for i in range(len(made))], **more)
        return self.model(node, states, feed)

    def model(self, node: onnx.NodeProto, states: int, more: Feed) -> tuple[onnx.ModelProto, Feed]:
        feed = {"x": self.values.standard_normal((3, 3)).astype(np.float32), **more}
        kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in feed.items()}
        entries = [helper.make_tensor_value_info(name, kinds[name], value.shape) for name, value in feed.items()]
        outputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * (2 if i < states else 3))
            for i, name in enumerate(node.output)
        ]
        graph = helper.make_graph([node], "g", entries, outputs, self.stored)
        return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", self.opset)]), feed


def value_of(name: str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [3, 3] if kind == TensorProto.FLOAT else [])


@QUICK
@given(st.sampled_from([Builder.loop, Builder.scan]), st.integers(0, 2**32 - 1))
def test_random_loops_survive_opening_and_closing(
    form: Callable[[Builder], tuple[onnx.ModelProto, Feed]], seed: int
) -> None:
    build = Builder(random.Random(seed))
    model, feed = form(build)
    found = agreed_by_all(model, Path(), ([feed],), "cpu")
    assert found.taken == (("y0", build.count),)
    assert off(model, found.flat, feed) == 0
    assert found.closed(found.flat).SerializeToString() == model.SerializeToString()
    _, after = at_full_rank(found)
    onnx.checker.check_model(after)
    assert not any(mark in known for known in all_names(after) for mark in (BORDER, "@"))
    assert off(model, after, feed) < 1e-4


# The whole journey


WIDTH = 256


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight of rank 16 in a loop of three runs, samples, others that run it differently often, and a table."""
    folder = tmp_path_factory.mktemp("loops")
    rng = np.random.default_rng(0)
    head = HEAD.replace("[4,6]", f"[n,{WIDTH}]")
    text = loop(f"{GO} k = MatMul(h, low) o = Tanh(k)").replace("[4,6]", f"[n,{WIDTH}]")
    model = model_of(head, text)
    weight = rng.standard_normal((WIDTH, 16)) @ rng.standard_normal((16, WIDTH)) / WIDTH
    model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "low"))
    onnx.save(model, folder / "m.onnx")
    x = rng.standard_normal((16, 64, WIDTH)).astype(np.float32)
    for name, counts in (("x", np.full(16, 3)), ("two", np.full(16, 2)), ("other", np.arange(16) % 2 + 2)):
        np.savez(folder / f"{name}.npz", x=x, m=counts, t=np.ones(16, bool))
    save_table(folder / "t.json", WIDTH)
    return folder


def optimized(home: Path, out: str, data: str = "x.npz") -> onnx_lowrank.Report:
    given_: dict[str, Any] = {"cache": home / "t.json", "verify_latency": False}
    return onnx_lowrank.optimize(home / "m.onnx", home / out, data=home / data, **given_)


def test_a_loop_is_optimised_and_replayed_to_the_byte(home: Path) -> None:
    report = optimized(home, "out.onnx")
    (decision,) = report.plan.decisions
    assert (decision.node, decision.kind, decision.rank, decision.tied) == ("k", "svd", 32, ("k@2", "k@3"))
    assert decision.ms_before == pytest.approx(3 * ROW["dense"])
    assert decision.ms_after == pytest.approx(3 * ROW["svd 32"])
    assert (report.before.parameters, report.after.parameters) == (WIDTH**2, 2 * 32 * WIDTH)
    assert report.before.macs == 3 * 64 * WIDTH**2
    assert report.after.macs == 3 * 64 * 2 * 32 * WIDTH
    assert report.to_dict()["kept"] == {Why.NOT_LINEAR.value: 2}
    before, after = (onnx.load(home / name) for name in ("m.onnx", "out.onnx"))
    assert [n.op_type for n in after.graph.node] == ["Loop"]
    assert [n.name or n.op_type for n in body_of(after).node] == ["Identity", "k/down", "k/up", "Tanh"]
    assert sorted(t.name for t in body_of(after).initializer) == ["k/down.weight", "k/up.weight"]
    assert len(after.graph.initializer) == 0
    longer = {"x": np.ones((3, WIDTH), np.float32), "m": np.array(7), "t": np.array(True)}
    assert off(before, after, longer) < 1e-3
    again: dict[str, Any] = {"data": home / "x.npz", "cache": home / "t.json", "verify_latency": False}
    onnx_lowrank.apply(report.plan, home / "m.onnx", home / "again.onnx", **again)
    assert (home / "again.onnx").read_bytes() == (home / "out.onnx").read_bytes()


def test_a_loop_that_samples_run_differently_often_stays_as_it_is(home: Path) -> None:
    report = optimized(home, "same.onnx", "other.npz")
    assert report.plan.decisions == ()
    assert report.to_dict()["kept"][Why.SUBGRAPH.value] == 3
    assert (home / "same.onnx").read_bytes() == (home / "m.onnx").read_bytes()


def test_a_plan_is_for_as_many_runs(home: Path) -> None:
    plan = optimized(home, "three.onnx").plan
    with pytest.raises(SettingsError, match="shared with k@2 here, but with k@2, k@3 in the plan"):
        onnx_lowrank.apply(plan, home / "m.onnx", home / "no.onnx", data=home / "two.npz", cache=home / "t.json")
