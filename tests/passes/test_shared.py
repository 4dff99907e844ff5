"""A common factor in a real model: nodes, numbers in the runtime, the checker; and what all sites of a set need."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_lowrank.calibration import Fits
from onnx_lowrank.errors import PassError, SettingsError
from onnx_lowrank.fitting import calibrate
from onnx_lowrank.passes.shared import Pivots, most_rank, shared_cost
from onnx_lowrank.plan import Decision
from onnx_lowrank.prepare import Loaded, load
from onnx_lowrank.rewrite import check_matches, rewritten
from onnx_lowrank.runtime import Session
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Geometry

WIDTHS = {"q": 14, "k": 24, "v": 10}
INPUTS, POSITIONS = 16, 40

TEXTS = {
    "matmul": """(float[2,40,16] x) => (float[2,40,14] yq, float[2,40,24] yk, float[2,40,10] yv) {
        mq = MatMul(x, wq) aq = Add(mq, bq) yq = Tanh(aq)
        mk = MatMul(x, wk) yk = Add(mk, bk) mv = MatMul(x, wv) yv = Add(bv, mv) }""",
    "matmul without bias": """(float[80,16] x) => (float[80,14] yq, float[80,24] yk, float[80,10] yv) {
        yq = MatMul(x, wq) yk = MatMul(x, wk) yv = MatMul(x, wv) }""",
    "constant on the left": """(float[2,16,40] x) => (float[2,14,40] yq, float[2,24,40] yk, float[2,10,40] yv) {
        yq = MatMul(tq, x) yk = MatMul(tk, x) yv = MatMul(tv, x) }""",
    "gemm": """(float[16,80] x) => (float[80,14] yq, float[80,24] yk, float[80,10] yv) {
        yq = Gemm <transA = 1> (x, wq, bq) yk = Gemm <transA = 1> (x, wk, bk)
        yv = Gemm <transA = 1, transB = 1> (x, tv, bv) }""",
    "pointwise": """(float[2,16,9,9] x) => (float[2,14,5,3] yq, float[2,24,5,3] yk, float[2,10,5,3] yv) {
        yq = Conv <strides = [2,3]> (x, cq, bq) yk = Conv <strides = [2,3]> (x, ck, bk)
        yv = Conv <strides = [2,3]> (x, cv, bv) }""",
    "conv": """(float[2,4,9,9] x) => (float[2,14,9,9] yq, float[2,24,9,9] yk, float[2,10,9,9] yv) {
        yq = Conv <pads = [0,0,1,1]> (x, kq) yk = Conv <pads = [0,0,1,1]> (x, kk)
        yv = Conv <pads = [0,0,1,1]> (x, kv) }""",
}  # fmt: skip
SHAPES = {
    "matmul": (2, 40, 16), "matmul without bias": (80, 16), "constant on the left": (2, 16, 40), "gemm": (16, 80),
    "pointwise": (2, 16, 9, 9), "conv": (2, 4, 9, 9),
}  # fmt: skip
each = pytest.mark.parametrize("name", TEXTS)


def constants(rng: np.random.Generator) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for letter, width in WIDTHS.items():
        weight = rng.standard_normal((INPUTS, width)) / INPUTS**0.5
        found |= {f"w{letter}": weight, f"t{letter}": weight.T, f"c{letter}": weight.T[..., None, None]}
        found |= {f"k{letter}": rng.standard_normal((width, 4, 2, 2)) / 4, f"b{letter}": rng.standard_normal(width)}
    return found


def saved(folder: Path, name: str) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {TEXTS[name]}')
    words = set(TEXTS[name].replace("(", " ").replace(")", " ").replace(",", " ").split())
    for constant, value in constants(np.random.default_rng(0)).items():
        if constant in words:
            model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), constant))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, strict_mode=True), full_check=True)
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def calibrated(folder: Path, name: str) -> tuple[Loaded, Fits]:
    rng, shape = np.random.default_rng(1), SHAPES[name]
    data = [{"x": (rng.standard_normal(shape) + 0.5).astype(np.float32)} for _ in range(24)]
    settings = Settings(kinds=("shared",), cache=folder)
    loaded = load(saved(folder, name), data, settings, lambda *_: None)
    return loaded, calibrate(loaded, settings, lambda *_: None)


def decided(loaded: Loaded, rank: int, letters: str = "qkv") -> list[Decision]:
    """Sites are named after their nodes, which are nameless here: by their position."""
    members = [site for site, letter in zip(loaded.sites, "qkv", strict=True) if letter in letters]
    names = tuple(site.name for site in members)
    return [
        Decision(s.name, s.geometry.op, (s.geometry.outputs, s.geometry.inputs), "shared", rank, sharers=names)
        for s in members
    ]


def outputs(loaded: Loaded, model: onnx.ModelProto) -> list[np.ndarray[Any, Any]]:
    session = Session(model)
    return [np.stack(many) for many in zip(*(session.run(feed) for feed in loaded.calibration), strict=True)]


@each
def test_full_rank_is_exact(tmp_path: Path, name: str) -> None:
    """Every rank is allowed up to the outputs of the widest site: the rank of all inputs is one of them."""
    loaded, fits = calibrated(tmp_path, name)
    assert {site.geometry.inputs for site in loaded.sites} == {INPUTS}
    model = rewritten(loaded.file, loaded.sites, fits, decided(loaded, INPUTS))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, strict_mode=True), full_check=True)
    for before, after in zip(outputs(loaded, loaded.file.model), outputs(loaded, model), strict=True):
        assert np.abs(after - before).max() < 2e-4 * np.abs(before).max()
    ops = [n.op_type for n in model.graph.node]
    assert ops.count("Concat") == 1
    assert ops.count("Conv") + ops.count("MatMul") + ops.count("Gemm") == 4
    assert not {"Gather", "Split", "Slice"} & set(ops)


@each
@pytest.mark.parametrize("letters", ["qkv", "qv"])
def test_the_error_of_every_output_is_the_predicted_one(tmp_path: Path, name: str, letters: str) -> None:
    loaded, fits = calibrated(tmp_path, name)
    chosen = decided(loaded, 8, letters)
    names = chosen[0].sharers
    model = rewritten(loaded.file, loaded.sites, fits, chosen)
    sites = {site.name: site for site in loaded.sites}
    before, after = ({s.name: y for s, y in zip(loaded.sites, outputs(loaded, m), strict=True)}
                     for m in (linear(loaded.file.model, loaded), linear(model, loaded)))  # fmt: skip
    for index, node in enumerate(names):
        site = sites[node]
        axis = 2 if site.geometry.op == "Conv" else (-2 if site.geometry.side == "left" else -1)
        y = np.moveaxis(before[node], axis, -1).reshape(-1, site.geometry.outputs).astype(np.float64)
        power = float(((y - (y.mean(axis=0) if site.centred else 0)) ** 2).sum())
        predicted = fits[names[0]].shared[names].relative(index, 8)
        assert predicted > 0.05
        lost = float(((before[node] - after[node]).astype(np.float64) ** 2).sum()) / power
        assert lost == pytest.approx(predicted, rel=0.15 if name == "conv" else 1e-3)


@each
def test_a_replay_of_a_part_samples_what_the_whole_family_was_fitted_to(tmp_path: Path, name: str) -> None:
    loaded, fits = calibrated(tmp_path, name)
    names = tuple(site.name for site in loaded.sites[1:])
    alone = calibrate(loaded, Settings(cache=tmp_path), lambda *_: None, dict.fromkeys(names, ("shared",)))
    one, other = (found[names[0]].shared[names] for found in (fits, alone))
    for field in dataclasses.fields(one):
        assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name


def linear(model: onnx.ModelProto, loaded: Loaded) -> onnx.ModelProto:
    """The same model with what leaves the sites as its outputs."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    del found.graph.output[:]
    found.graph.output.extend(onnx.ValueInfoProto(name=site.y) for site in loaded.sites)
    return found


def test_new_nodes_say_who_made_them_and_stand_before_what_reads_them(tmp_path: Path) -> None:
    loaded, fits = calibrated(tmp_path, "matmul")
    model = rewritten(loaded.file, loaded.sites, fits, decided(loaded, 8))
    made = [node for node in model.graph.node if node.op_type != "Tanh"]
    told = [{p.key: p.value for p in node.metadata_props} for node in made]
    assert {t["onnx_lowrank.pass"] for t in told} == {"shared"}
    assert {t["onnx_lowrank.site"] for t in told} == {site.name for site in loaded.sites}
    assert [node.op_type for node in model.graph.node][-1] == "Tanh"
    assert not {f"w{letter}" for letter in WIDTHS} & {t.name for t in model.graph.initializer}


def test_the_cost_is_that_of_the_weights_that_are_stored(tmp_path: Path) -> None:
    loaded, fits = calibrated(tmp_path, "matmul")
    model = rewritten(loaded.file, loaded.sites, fits, decided(loaded, 8))
    stored = sum(int(np.prod(t.dims)) for t in model.graph.initializer if len(t.dims) == 2)
    geometries = [site.geometry for site in loaded.sites]
    assert {sum(shared_cost(geometries, owner, 8)) for owner in range(3)} == {stored} == {8 * (16 + 14 + 24 + 10 - 8)}
    assert sum(shared_cost(geometries, 1, INPUTS - 1)) < INPUTS * sum(WIDTHS.values())
    assert most_rank(geometries) == INPUTS - 1
    assert most_rank(geometries[::2]) == 14


def test_sites_that_were_not_decided_together_are_refused(tmp_path: Path) -> None:
    loaded, fits = calibrated(tmp_path, "matmul")
    three = decided(loaded, 8)
    for wrong in (three[:1], [*three[:2], dataclasses.replace(three[2], rank=7)]):
        with pytest.raises(PassError, match="not decided together"):
            rewritten(loaded.file, loaded.sites, fits, wrong)
        with pytest.raises(SettingsError, match="not all of its sharers are"):
            check_matches(wrong, loaded.sites)
    stranger = [dataclasses.replace(d, sharers=three[0].sharers[1:]) for d in three]
    with pytest.raises(SettingsError, match="not all of its sharers are"):
        check_matches(stranger, loaded.sites)
    check_matches(three, loaded.sites)


def test_a_plan_for_sites_that_read_other_tensors_is_refused(tmp_path: Path) -> None:
    loaded, _ = calibrated(tmp_path, "matmul")
    three = decided(loaded, 8)
    moved = (*loaded.sites[:2], dataclasses.replace(loaded.sites[2], x="elsewhere"))
    with pytest.raises(SettingsError, match="with its sharers here"):
        check_matches(three, moved)
    with pytest.raises(SettingsError, match="with its sharers here"):
        check_matches(decided(loaded, INPUTS), loaded.sites)


def test_pivots_that_amplify_the_rounding_are_not_usable() -> None:
    rng = np.random.default_rng(0)
    geometry = Geometry("MatMul", 8, 12, "float32", True, 17, x_shape=(90, 12))
    good = [np.linalg.qr(rng.standard_normal((8, 4)))[0] for _ in range(2)]
    assert Pivots.of(good).usable(geometry)
    dead = [one * np.where(np.isin(np.arange(8), (0, 7)), 1e-6, 1)[:, None] for one in good]
    assert not Pivots.of(dead).usable(geometry)
    assert not Pivots.of(good).usable(dataclasses.replace(geometry, dtype="bfloat16"))
