"""Opened branches, opened fused nodes, multiplied neighbours, tied weights and common factors in one model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_lowrank.families import Apart, families, family_of
from onnx_lowrank.files import read_model
from onnx_lowrank.fitting import calibrate
from onnx_lowrank.plan import Decision
from onnx_lowrank.prepare import Loaded, load
from onnx_lowrank.protos import subgraphs
from onnx_lowrank.rewrite import check_matches, rewritten
from onnx_lowrank.runtime import Session
from onnx_lowrank.settings import Settings
from onnx_lowrank.verify import facts

SHAPES = {
    "w": (12, 10), "p": (12, 10), "v": (12, 10), "u": (12, 10), "o": (12, 10), "a": (12, 64), "e": (64, 10),
    "q": (12, 12), "one": (1,), "two": (1,), "kf": (10, 12, 1, 1), "kg": (10, 12, 1, 1),
    "f": (64, 12), "kh": (12, 12, 1, 1),
}  # fmt: skip
IF = "(float[n,12] x, bool c) => (float[n,10] y)"
OTHER = "else_branch = two () => (float[n,10] s) { s = MatMul(x, o) }>"


def prepared(folder: Path, header: str, body: str, **choices: Any) -> Loaded:
    """A model whose every sample takes the first branch of its If, if it has one; w, p, v and u have rank 6."""
    opsets = '["" : 17, "com.microsoft" : 1]'
    model = onnx.parser.parse_model(f"<ir_version: 8, opset_import: {opsets}> g {header} {{ {body} }}")
    rng = np.random.default_rng(0)
    left = rng.standard_normal((2, 12, 6))
    for name, shape in SHAPES.items():
        value = rng.standard_normal(shape)
        if name in "wpvu":  # two and two read the same directions
            value = left[int(name in "vu")] @ value[:6]
        if f", {name})" in body:
            model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    onnx.save(model, folder / "m.onnx")
    given: dict[str, Any] = {"c": np.array(True)} if "bool c" in header else {}
    shape = (2, 12, 5, 4) if "[n,12,h,l]" in header else (40, 12)
    samples = [{"x": rng.standard_normal(shape).astype(np.float32), **given} for _ in range(6)]
    settings = Settings(cache=folder, **{"verify_latency": False, **choices})
    return load(folder / "m.onnx", samples, settings, lambda *_: None)


def built(known: Loaded, decisions: list[Decision], **choices: Any) -> onnx.ModelProto:
    """The model as it is saved."""
    fits = calibrate(known, Settings(**choices), lambda *_: None)
    model = known.opening.closed(rewritten(known.file, known.sites, fits, decisions))
    onnx.checker.check_model(model)
    return model


def bodies(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    return list(subgraphs(next(node for node in model.graph.node if node.op_type == "If")))


def off(known: Loaded, model: onnx.ModelProto, taken: bool = True) -> float:
    """Largest difference to the file on disk, relative to its largest output."""
    feed = {**known.feeds[0], **({"c": np.array(taken)} if "c" in known.feeds[0] else {})}
    before, after = (Session(one).run(feed)[0] for one in (read_model(known.file.path).model, model))
    return float(np.abs(before - after).max() / np.abs(before).max())


def test_fused_nodes_of_a_branch_are_opened_with_it_and_closed_before_it(tmp_path: Path) -> None:
    gemm = 'com.microsoft.FusedGemm <activation = "Relu">'
    body = f"y = If (c) <then_branch = one () => (float[n,10] h) {{ r = {gemm}(x, q) h = {gemm}(r, w) }}, {OTHER}"
    known = prepared(tmp_path, IF, body)
    assert [site.geometry.op for site in known.sites] == ["Gemm", "Gemm"]
    original = read_model(known.file.path).model
    assert built(known, []).SerializeToString() == original.SerializeToString()
    site = known.sites[1]
    after = built(known, [Decision(site.name, "Gemm", (10, 12), "svd", 10)])
    assert [n.op_type for n in bodies(after)[0].node] == ["FusedGemm", "MatMul", "Gemm", "Relu"]
    assert bodies(after)[1] == bodies(original)[1]
    assert off(known, after) < 1e-5
    assert off(known, after, taken=False) == 0


def looped(runs: int, inside: str) -> str:
    """x runs through a body, which has its own trip count, so that no sample needs to give one."""
    body = f"one (int64 i, bool c, float[n,12] h) => (bool d, float[n,12] o) {{ d = Identity(c) {inside} }}"
    return f"m = Constant <value = int64 {{{runs}}}> () y = Loop (m, , x) <body = {body}>"


def in_the_loop(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for node in model.graph.node for body in subgraphs(node) for n in body.node][1:]


def test_fused_nodes_of_a_loop_are_opened_at_every_run_and_closed_before_it(tmp_path: Path) -> None:
    gemm = 'com.microsoft.FusedGemm <activation = "Relu">'
    body = looped(2, f"r = {gemm}(h, q) o = {gemm}(r, q)")
    known = prepared(tmp_path, "(float[n,12] x) => (float[n,12] y)", body)
    (site,) = known.sites
    assert [place.name for place in site.places] == ["r", "o", "r@2", "o@2"]
    assert not any("@" in keep.node for keep in known.kept)
    assert built(known, []).SerializeToString() == read_model(known.file.path).model.SerializeToString()
    tied = tuple(twin.name for twin in site.twins)
    after = built(known, [Decision(site.name, "Gemm", (12, 12), "svd", 12, tied=tied)])
    assert in_the_loop(after) == ["MatMul", "Gemm", "Relu"] * 2
    assert off(known, after) < 1e-5


@pytest.mark.parametrize("runs", [1, 2])
def test_neighbours_in_a_loop_are_multiplied_where_it_runs_once(tmp_path: Path, runs: int) -> None:
    body = looped(runs, "k = MatMul(h, a) l = MatMul(k, f) j = MatMul(l, q) o = Tanh(j)")
    known = prepared(tmp_path, "(float[n,12] x) => (float[n,12] y)", body)
    assert len(known.merged) == (2 if runs == 1 else 0)
    after = built(known, [])
    assert in_the_loop(after) == (["MatMul", "Tanh"] if runs == 1 else ["MatMul", "MatMul", "MatMul", "Tanh"])
    assert off(known, after) < 1e-5


@pytest.mark.parametrize("runs", [1, 2])
def test_scales_in_a_loop_go_into_its_convolution_where_it_runs_once(tmp_path: Path, runs: int) -> None:
    inside = "k = Mul(h, one) j = Conv(k, kh) o = Mul(j, two)"
    body = looped(runs, inside).replace("float[n,12]", "float[n,12,h,l]")
    known = prepared(tmp_path, "(float[n,12,h,l] x) => (float[n,12,h,l] y)", body)
    assert [one.taken_in.count(", ") for one in known.merged] == [1] * (runs == 1)
    after = built(known, [])
    assert in_the_loop(after) == (["Conv"] if runs == 1 else ["Mul", "Conv", "Mul"])
    assert off(known, after) < 1e-5


def test_neighbours_in_a_branch_are_multiplied_there(tmp_path: Path) -> None:
    inside = "m = MatMul(x, a) k = MatMul(m, e) h = Relu(k)"
    body = f"y = If (c) <then_branch = one () => (float[n,10] h) {{ {inside} }}, {OTHER}"
    known = prepared(tmp_path, IF, body)
    assert [(one.taken_in, one.node) for one in known.merged] == [("m", "k")]
    after = built(known, [])
    assert [n.op_type for n in bodies(after)[0].node] == ["MatMul", "Relu"]
    assert [list(t.dims) for t in bodies(after)[0].initializer] == [[12, 10]]
    assert [t.name for t in after.graph.initializer] == ["o"]
    assert off(known, after) < 1e-5
    assert off(known, after, taken=False) == 0
    before = facts(known.file, known)
    assert (before.parameters, before.macs) == (12 * 64 + 64 * 10 + 12 * 10, 40 * (12 * 64 + 64 * 10))
    onnx.save(after, tmp_path / "after.onnx")
    made = facts(read_model(tmp_path / "after.onnx"), known)
    assert (made.parameters, made.macs) == (2 * 12 * 10, 40 * 12 * 10)


def test_neighbours_on_two_sides_of_a_border_stay_two(tmp_path: Path) -> None:
    body = f"m = MatMul(x, a) y = If (c) <then_branch = one () => (float[n,10] h) {{ h = MatMul(m, e) }}, {OTHER}"
    known = prepared(tmp_path, IF, body)
    assert (len(known.sites), known.merged) == (2, ())


def shared_at(known: Loaded, names: tuple[str, ...], rank: int) -> list[Decision]:
    shapes = {site.name: (site.geometry.outputs, site.geometry.inputs) for site in known.sites}
    return [Decision(name, "MatMul", shapes[name], "shared", rank, sharers=names) for name in names]


def test_a_factor_is_shared_on_one_side_of_a_border(tmp_path: Path) -> None:
    """Four sites read x, two of them in the branch: two factors, each exact, for two weights read six directions."""
    body = (
        "m = MatMul(x, w) g = MatMul(x, p) z = If (c) <then_branch = one () => (float[n,10] h) "
        f"{{ k = MatMul(x, v) l = MatMul(x, u) t = Tanh(l) h = Add(k, t) }}, {OTHER} d = Sub(m, g) y = Add(z, d)"
    )
    known = prepared(tmp_path, IF, body)
    sites = {site.name: site for site in known.sites}
    assert {name: site.branch for name, site in sites.items()} == {"m": "", "g": "", "k": "z", "l": "z"}
    assert [[site.name for site in family] for family in families(known.sites)] == [["m", "g"], ["k", "l"]]
    assert family_of(sites["m"], [sites["m"], sites["k"]]) is Apart.BRANCH
    decisions = [*shared_at(known, ("m", "g"), 6), *shared_at(known, ("k", "l"), 6)]
    check_matches(decisions, known.sites)
    after = built(known, decisions, kinds=("shared",))
    products = [[n.name for n in graph.node if n.op_type == "MatMul"] for graph in (after.graph, bodies(after)[0])]
    assert [len(names) for names in products] == [3, 3]
    assert {name.split("/")[0] for name in products[1]} == {"k", "l"}
    assert {math.prod(t.dims) for t in bodies(after)[0].initializer} == {72, 60, 24}
    assert off(known, after) < 1e-5
    assert off(known, after, taken=False) < 1e-5


def test_a_tied_weight_takes_no_part_in_common_factors_and_products(tmp_path: Path) -> None:
    header = "(float[n,12] x) => (float[n,10] y, float[n,10] z)"
    body = "h = MatMul(x, q) i = MatMul(h, q) y = MatMul(i, w) z = MatMul(x, v)"
    known = prepared(tmp_path, header, body)
    sites = {site.name: site for site in known.sites}
    assert [twin.name for twin in sites["h"].twins] == ["i"]
    assert known.merged == ()
    assert family_of(sites["h"], known.sites) is Apart.TIED
    assert family_of(sites["z"], known.sites) is Apart.ALONE
    after = built(known, [Decision("h", "MatMul", (12, 12), "svd", 12, tied=("i",))])
    assert off(known, after) < 1e-5
    assert [n.op_type for n in after.graph.node] == ["MatMul"] * 6


@pytest.mark.parametrize("merge", [True, False])
def test_a_tied_weight_and_a_pair_beside_it(tmp_path: Path, merge: bool) -> None:
    header = "(float[n,12] x) => (float[n,12] y, float[n,10] z)"
    body = "h = MatMul(x, q) r = Relu(h) y = MatMul(r, q) m = MatMul(x, a) z = MatMul(m, e)"
    known = prepared(tmp_path, header, body, merge=merge)
    assert len(known.merged) == merge
    assert {site.name: len(site.places) for site in known.sites} == (
        {"h": 2, "z": 1} if merge else {"h": 2, "m": 1, "z": 1}
    )
    assert off(known, built(known, [])) < 1e-5


def test_scales_in_a_branch_go_into_its_convolution_and_those_before_it_stay(tmp_path: Path) -> None:
    image = "(float[n,12,h,l] x, bool c) => (float[n,10,h,l] y)"
    inside = "m = Mul(j, one) k = Conv(m, kf) h = Mul(k, two)"
    other = "else_branch = two () => (float[n,10,h,l] s) { s = Conv(x, kg) }>"
    body = f"j = Mul(x, one) y = If (c) <then_branch = one_ () => (float[n,10,h,l] h) {{ {inside} }}, {other}"
    known = prepared(tmp_path, image, body)
    assert [one.taken_in.count(", ") for one in known.merged] == [1]
    after = built(known, [])
    assert [n.op_type for n in after.graph.node] == ["Mul", "If"]
    assert [n.op_type for n in bodies(after)[0].node] == ["Conv"]
    assert off(known, after) < 1e-5
    assert off(known, after, taken=False) == 0
