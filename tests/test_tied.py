"""One weight read by several nodes: one decision, one fit on all their inputs, one set of factors for all of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import onnx_lowrank
from onnx_lowrank.calibration import collect, factorize
from onnx_lowrank.errors import PassError, SettingsError
from onnx_lowrank.files import ModelFile
from onnx_lowrank.fitting import calibrate
from onnx_lowrank.fragment import Fragment, Kind, Op, X, Y
from onnx_lowrank.graph import Graph, Patch, Place
from onnx_lowrank.insitu import by_site, dense_shares, tails
from onnx_lowrank.measure import parameters
from onnx_lowrank.passes import KINDS
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.plan import Decision
from onnx_lowrank.prepare import load
from onnx_lowrank.rewrite import rewritten
from onnx_lowrank.runtime import Session
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Site, Why
from tests.saved import ROW, save_table

SHAPES = {
    "w": (12, 10), "v": (10, 12), "b": (10,), "c": (10,), "q": (12, 12), "k": (10, 4, 3, 3),
    "g1": (10,), "g2": (10,), "g3": (10,), "g4": (10,),
}  # fmt: skip
VECTORS = "(float[n,12] x, float[m,12] u) => (float[n,10] y, float[m,10] z)"
IMAGES = "(float[n,4,a,e] x, float[m,4,f,o] u) => (float[n,10,h,l] y, float[m,10,i,j] z)"
NORM = "BatchNormalization"
TIED = {
    "two": (VECTORS, "y = MatMul(x, w) z = MatMul(u, w)", (1, 1)),
    "one bias": (VECTORS, "p = MatMul(x, w) y = Add(p, b) o = MatMul(u, w) z = Add(b, o)", (2, 2)),
    "two biases": (VECTORS, "p = MatMul(x, w) y = Add(p, b) o = MatMul(u, w) z = Add(o, c)", (1, 1)),
    "one of them with a bias": (VECTORS, "p = MatMul(x, w) y = Add(p, b) z = MatMul(u, w)", (1, 1)),
    "one Transpose": (VECTORS, "t = Transpose(v) y = MatMul(x, t) z = MatMul(u, t)", (1, 1)),
    "two Transposes": (VECTORS, "t = Transpose(v) s = Transpose(v) y = MatMul(x, t) z = MatMul(u, s)", (1, 1)),
    "a chain": (
        "(float[n,12] x) => (float[n,12] y)",
        "p = MatMul(x, q) r = Tanh(p) s = MatMul(r, q) y = MatMul(s, q)",
        (1, 1, 1),
    ),
    "the same input": ("(float[n,12] x) => (float[n,10] y)", "p = MatMul(x, w) o = MatMul(x, w) y = Add(p, o)", (1, 1)),
    "Gemm": (VECTORS, "y = Gemm <transB = 1> (x, v, b) z = Gemm <transB = 1> (u, v, b)", (1, 1)),
    "a scale behind one Gemm": (
        VECTORS,
        "p = Gemm <transB = 1> (x, v, b) y = Mul(p, c) z = Gemm <transB = 1> (u, v, b)",
        (1, 1),
    ),
    "Conv": (IMAGES, "p = Conv(x, k) y = Relu(p) z = Conv(u, k)", (1, 1)),
    "one norm": (
        IMAGES,
        f"p = Conv(x, k) y = {NORM}(p, g1, g2, g3, g4) o = Conv(u, k) z = {NORM}(o, g1, g2, g3, g4)",
        (2, 2),
    ),
    "two norms": (
        IMAGES,
        f"p = Conv(x, k) y = {NORM}(p, g1, g2, g3, g4) o = Conv(u, k) z = {NORM}(o, g4, g2, g3, g1)",
        (1, 1),
    ),
}
"""Header, body, and how many nodes each place stands for."""

each = pytest.mark.parametrize("name", TIED)


def model_of(header: str, body: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {header} {{ {body} }}')
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    rng = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        if name in words:
            value = rng.random(shape) + 0.5 if name in ("g1", "g4") else rng.standard_normal(shape)
            model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return model


def made(name: str) -> tuple[onnx.ModelProto, Site, list[dict[str, Any]]]:
    """A model, its one site with the shapes of its inputs, and samples; the two inputs differ in count and in scale."""
    header, body, _ = TIED[name]
    model = model_of(header, body)
    (site,) = survey(Graph(model, Path())).sites
    shapes = {"x": (40, 12), "u": (60, 12)} if "[n,12]" in header else {"x": (2, 4, 9, 9), "u": (3, 4, 7, 7)}
    fed = {value.name for value in model.graph.input}
    rng = np.random.default_rng(1)
    samples = [
        {
            n: (rng.standard_normal(s) * (1 + 2 * (n == "u")) + 1).astype(np.float32)
            for n, s in shapes.items()
            if n in fed
        }
        for _ in range(4)
    ]
    return model, site.seen((shapes["x"],)), samples


def fitted_at(name: str, kind: str, rank: int) -> tuple[Site, Any, onnx.ModelProto, onnx.ModelProto, list[Any]]:
    """The site, its fit, the model before and after, and the samples."""
    model, site, samples = made(name)
    moments = collect(model, Path(), [site], samples, bytes_of=lambda _: 1, provider="cpu", progress=lambda *_: None)
    fit = factorize(site, moments[site.taps])
    decision = Decision.of(site)
    decision = Decision(**{**decision.__dict__, "kind": kind, "rank": rank})
    return (
        site,
        fit,
        model,
        rewritten(ModelFile(Path(), model, "", 0, False), [site], {site.name: fit}, [decision]),
        samples,
    )


def low_rank(site: Site) -> str:
    return "conv_svd" if site.geometry.op == "Conv" else "svd"


@each
def test_nodes_that_read_one_weight_alike_are_one_site(name: str) -> None:
    header, body, counts = TIED[name]
    model = model_of(header, body)
    found = survey(Graph(model, Path()))
    (site,) = found.sites
    assert tuple(len(place.nodes) for place in site.places) == counts
    assert {k.why for k in found.kept} <= {Why.NOT_LINEAR}
    assert len(site.places) + len(found.kept) == len(model.graph.node)


@each
def test_full_rank_is_exact_and_the_factors_are_stored_once(name: str) -> None:
    _, site, _ = made(name)
    full = min(site.geometry.outputs, site.geometry.inputs)
    site, _, before, after, samples = fitted_at(name, low_rank(site), full)
    onnx.checker.check_model(after, full_check=True)
    for y, z in zip(Session(before).run(samples[0]), Session(after).run(samples[0]), strict=True):
        assert z == pytest.approx(y, abs=1e-4 * float(np.abs(y).max()))
    new = {t.name for t in after.graph.initializer} - {t.name for t in before.graph.initializer}
    assert {name.rpartition("/")[0] for name in new} == {site.name}
    assert len(new) == 2 + (site.bias is not None)
    for place in site.places:
        assert {n.name.rpartition("/")[2] for n in after.graph.node if n.name.startswith(f"{place.name}/")} >= {
            "down",
            "up",
        }


@pytest.mark.parametrize("name", [name for name in TIED if name != "a chain"])  # it would disturb its own inputs
def test_the_error_over_all_places_is_the_predicted_one(name: str) -> None:
    _, site, _ = made(name)
    site, fit, before, after, samples = fitted_at(name, low_rank(site), 4)
    ends = [place.y for place in site.places]
    off, count = 0.0, 0
    for sample in samples:
        old, new = (tensors(model, ends, sample) for model in (before, after))
        off += sum(float(np.sum((np.float64(a) - b) ** 2)) for a, b in zip(old, new, strict=True))
        count += sum(a.size for a in old) // site.geometry.outputs
    assert off / count == pytest.approx(fit.factorization.error(4), rel=1e-3)
    assert fit.factorization.error(4) > 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.split and kind.terms < 4], ids=lambda kind: kind.name)
def test_nested_kinds_are_fitted_to_all_places(kind: Kind, tmp_path: Path) -> None:
    """A kernel that they write exactly at rank 2 stays what it is at both places."""
    header, body, _ = TIED["Conv"]
    model, rng = model_of(header, body), np.random.default_rng(3)
    parts = [rng.standard_normal(shape) for shape in ((10, 2), (2, 4), (3,), (3,))]
    kernel = np.einsum("nr,rc,i,j->ncij", *parts)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(kernel.astype(np.float32), "k"))
    onnx.save(model, tmp_path / "m.onnx")
    shapes = {"x": (2, 4, 4, 4), "u": (1, 4, 5, 4)}  # so few positions that all are taken
    samples = [{n: (rng.standard_normal(s) + 1).astype(np.float32) for n, s in shapes.items()} for _ in range(6)]
    settings = Settings(cache=tmp_path, kinds=(kind.name,))
    loaded = load(tmp_path / "m.onnx", samples, settings, lambda *_: None)
    decision = dataclasses.replace(Decision.of(loaded.sites[0]), kind=kind.name, rank=2, inner=2 * (kind.ranks > 1))
    fits = calibrate(loaded, settings, lambda *_: None)
    after = rewritten(loaded.file, loaded.sites, fits, [decision])
    for y, z in zip(Session(model).run(samples[0]), Session(after).run(samples[0]), strict=True):
        assert z == pytest.approx(y, abs=1e-4 * float(np.abs(y).max()))


def test_times_inside_the_model_are_those_of_all_places(home: Path) -> None:
    loaded = load(home / "tied.onnx", home / "x.npz", Settings(cache=home), lambda *_: None)
    assert by_site({"p/down": 1.0, "p/up": 2.0, "r/down": 4.0, "s": 8.0}, loaded.sites, {}) == {"p": 7.0}
    assert tails(loaded) == {"p": "p", "q": "p", "r": "p", "s": "p", "y": "p"}
    assert dense_shares(loaded, Settings(cache=home)).keys() == {"p"}


def tensors(model: onnx.ModelProto, names: list[str], sample: dict[str, Any]) -> list[Any]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names))
    found = dict(zip(dict.fromkeys(names), Session(copy, optimisations="disable_all").run(sample), strict=True))
    return [found[name] for name in names]


@each
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.split is None], ids=lambda kind: kind.name)
def test_parameters_never_grow(name: str, kind: Any) -> None:
    _, site, _ = made(name)
    if not kind.applies(site.geometry):
        return
    before, after = fitted_at(name, kind.name, kind.max_rank(site.geometry))[2:4]
    assert parameters(after) <= parameters(before)


OTHERWISE = {
    "a table": ("y = MatMul(x, w) z = Gather(w, i)", "(float[n,12] x, int64[m] i) => (float[n,10] y, float[m,10] z)"),
    "a transposed reader": ("p = MatMul(x, q) t = Transpose(q) y = MatMul(p, t)", "(float[n,12] x) => (float[n,12] y)"),
    "another scale": ("y = Gemm(x, w, b) z = Gemm <alpha = 0.5> (u, w, b)", VECTORS),
    "another bias": ("y = Gemm(x, w, b) z = Gemm(u, w, c)", VECTORS),
    "another operator": ("y = MatMul(x, w) z = Gemm(u, w)", VECTORS),
    "another stride": ("y = Conv(x, k) z = Conv <strides = [2, 2]> (u, k)", IMAGES),
    "twice by one node": ("y = MatMul(x, q) z = MatMul(q, q)", "(float[n,12] x) => (float[n,12] y, float[12,12] z)"),
    "an alias that leaves": ("y = MatMul(x, w) z = Identity(w)", "(float[n,12] x) => (float[n,10] y, float[12,10] z)"),
    "an alias that nothing reads": ("t = Transpose(w) y = MatMul(x, w)", "(float[n,12] x) => (float[n,10] y)"),
    "computed with": ("y = MatMul(x, w) o = MatMul(u, w) r = Relu(w) z = MatMul(o, r)",
        "(float[n,12] x, float[12,12] u) => (float[n,10] y, float[12,10] z)"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_weight_that_is_read_in_another_way_too_stays(name: str) -> None:
    body, header = OTHERWISE[name]
    found = survey(Graph(model_of(header, body), Path()))
    assert found.sites == ()
    assert Why.SHARED in {keep.why for keep in found.kept}


def test_readers_of_other_dimensions_stay(tmp_path: Path) -> None:
    header = "(float[n,12] x, float[a,m,12] u) => (float[n,10] y, float[a,m,10] z)"
    onnx.save(model_of(header, TIED["two"][1]), tmp_path / "m.onnx")
    sample = {"x": np.ones((3, 12), np.float32), "u": np.ones((2, 3, 12), np.float32)}
    loaded = load(tmp_path / "m.onnx", [sample] * 2, Settings(cache=tmp_path), lambda *_: None)
    assert loaded.sites == ()
    assert [k.why for k in loaded.kept] == [Why.SHARED]


def test_a_place_that_was_replaced_is_not_replaced_again() -> None:
    graph = Graph(model_of(VECTORS, TIED["two"][1]), Path())
    (site,) = survey(graph).sites
    fragment = dense_fragment(site.geometry, site.weight, site.bias_vector)
    same = Place("again", site.nodes, site.x, site.y)
    with pytest.raises(PassError, match="already replaced"):
        graph.apply(Patch(site.name, site.nodes, site.x, site.y, fragment, "dense", twins=(same,)))


def test_a_fragment_of_several_outputs_goes_to_one_place() -> None:
    header = "(float[n,12] x, float[m,12] u) => (float[n,10] y, float[n,10] p, float[m,10] z)"
    graph = Graph(model_of(header, "y = MatMul(x, w) p = Relu(x) z = MatMul(u, w)"), Path())
    (site,) = survey(graph).sites
    whole = dense_fragment(site.geometry, site.weight, site.bias_vector)
    both = Fragment((*whole.ops, Op("act", "Relu", (X,), "p")), whole.constants, (Y, "p"))
    twin = Place(site.twins[0].name, site.twins[0].nodes, site.twins[0].x, site.twins[0].y)
    with pytest.raises(PassError, match="does not produce its output"):
        graph.apply(Patch(site.name, (0, 1), site.x, site.y, both, "dense", others=("p",), twins=(twin,)))


WIDTH = 512


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight of rank 16 that three layers read, the same with a weight for each, samples, and a table of times."""
    folder = tmp_path_factory.mktemp("tied")
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((WIDTH, 16)) @ rng.standard_normal((16, WIDTH)) / WIDTH).astype(np.float32)
    head = f'<ir_version: 8, opset_import: ["" : 17]> g (float[n,{WIDTH}] x) => (float[n,{WIDTH}] y)'
    for name, reads in (("tied", "www"), ("untied", "abc")):
        body = "p = MatMul(x, {}) q = Relu(p) r = MatMul(q, {}) s = Relu(r) y = MatMul(s, {})".format(*reads)
        model = onnx.parser.parse_model(f"{head} {{ {body} }}")
        model.graph.initializer.extend(numpy_helper.from_array(weight, name) for name in dict.fromkeys(reads))
        onnx.save(model, folder / f"{name}.onnx")
    np.savez(folder / "x.npz", x=rng.standard_normal((16, 64, WIDTH)).astype(np.float32))
    save_table(folder / "t.json", WIDTH)
    return folder


def optimized(home: Path, out: str, **choices: Any) -> onnx_lowrank.Report:
    given = {"data": home / "x.npz", "cache": home / "t.json", "verify_latency": False, **choices}
    return onnx_lowrank.optimize(home / "tied.onnx", home / out, **given)


def test_one_decision_adds_up_the_times_of_all_and_is_replayed_to_the_byte(home: Path) -> None:
    report = optimized(home, "out.onnx")
    (decision,) = report.plan.decisions
    assert (decision.node, decision.kind, decision.rank, decision.tied) == ("p", "svd", 32, ("r", "y"))
    assert decision.ms_before == pytest.approx(3 * ROW["dense"])
    assert decision.ms_after == pytest.approx(3 * ROW["svd 32"])
    assert (report.before.parameters, report.after.parameters) == (WIDTH**2, 2 * 32 * WIDTH)
    assert report.after.macs == pytest.approx(report.before.macs * 2 * 32 / WIDTH)
    assert report.to_dict()["sites"][0]["tied"] == ["r", "y"]
    plan = onnx_lowrank.Plan.from_json(report.plan.to_json())
    assert plan == report.plan
    again: dict[str, Any] = {"data": home / "x.npz", "cache": home / "t.json", "verify_latency": False}
    onnx_lowrank.apply(plan, home / "tied.onnx", home / "again.onnx", **again)
    assert (home / "again.onnx").read_bytes() == (home / "out.onnx").read_bytes()


def test_a_plan_for_a_shared_weight_is_not_replayed_where_it_is_not_shared(home: Path) -> None:
    plan = optimized(home, "planned.onnx").plan
    with pytest.raises(SettingsError, match="shared with none here, but with r, y in the plan"):
        onnx_lowrank.apply(plan, home / "untied.onnx", home / "no.onnx", data=home / "x.npz", cache=home / "t.json")
    assert not (home / "no.onnx").exists()


def test_a_pattern_that_names_one_reader_names_all(home: Path) -> None:
    assert optimized(home, "one.onnx", include=("r",)).plan.rewritten
    assert not optimized(home, "none.onnx", exclude=("y",)).plan.decisions
