"""A narrower layer in a real model: nodes, numbers in the runtime, the checker; and what both halves need."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from onnx_lowrank import input_fits
from onnx_lowrank.calibration import Fit, Fits
from onnx_lowrank.chains import Chain, chain_after, disjoint_chains
from onnx_lowrank.errors import PassError, SettingsError
from onnx_lowrank.files import read_model
from onnx_lowrank.fitting import calibrate
from onnx_lowrank.graph import Graph
from onnx_lowrank.narrow import Narrow
from onnx_lowrank.passes.nystrom import narrow_positions
from onnx_lowrank.plan import Decision
from onnx_lowrank.prepare import load
from onnx_lowrank.rewrite import check_matches, rewritten
from onnx_lowrank.runtime import Session
from onnx_lowrank.settings import Settings

WIDTH = 16
COPIES = {3: 11, 7: 12}
"""Channels that are copies of others in every model here; the last one is dead."""

GELU = """(float[1,n,12] x) => (float[1,n,10] z) {
y = MatMul(x, w1) b = Add(y, v1) t = Tanh(b) k = Mul(t, v2) p = Div(k, root) e = Erf(p) a = Add(e, one) m = Mul(k, a)
o = Mul(m, half) q = MatMul(o, w2) z = Add(q, v3) }"""
GEMM = """(float[n,12] x) => (float[n,10] z) {
y = Gemm(x, w1, v1) r = PRelu(y, slope) z = Gemm <transB = 1> (r, w2t, v3) }"""
CONV = """(float[1,12,h,w] x) => (float[1,10,i,j] z) {
y = Conv <pads = [1,1,1,1]> (x, k1, v1) r = Relu(y) n = BatchNormalization(r, g, v2, v4, s)
d = Conv <group = 16> (n, dw, v2) p = MaxPool <kernel_shape = [2,2]> (d) z = Conv(p, k2, v3) }"""


def equal(rng: np.random.Generator, *shape: int, axis: int = 0) -> Any:
    """Random numbers in which the copies are equal along the channels, and the dead channel is zero."""
    value = rng.standard_normal(shape)
    where: list[Any] = [slice(None)] * len(shape)
    for copy, source in COPIES.items():
        to, of = list(where), list(where)
        to[axis], of[axis] = copy, source
        value[tuple(to)] = value[tuple(of)]
    where[axis] = -1
    value[tuple(where)] = 0
    return value


def constants(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "w1": equal(rng, 12, WIDTH, axis=1), "w2": rng.standard_normal((WIDTH, 10)),
        "w2t": rng.standard_normal((10, WIDTH)),
        "k1": equal(rng, WIDTH, 12, 3, 3), "k2": rng.standard_normal((10, WIDTH, 2, 2)),
        "dw": equal(rng, WIDTH, 1, 3, 3),
        "v1": equal(rng, WIDTH), "v2": equal(rng, WIDTH), "v4": equal(rng, WIDTH), "v3": rng.standard_normal(10),
        "g": np.abs(equal(rng, WIDTH)) + 0.1, "s": np.abs(equal(rng, WIDTH)) + 0.5, "slope": equal(rng, WIDTH),
        "root": np.array(2**0.5), "one": np.array(1.0), "half": np.array(0.5),
    }  # fmt: skip


def saved(folder: Path, text: str) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    for name, value in constants(np.random.default_rng(0)).items():
        if name in words:
            model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, strict_mode=True), full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model)
    onnx.save(inferred, folder / "m.onnx")
    return folder / "m.onnx"


def calibrated(folder: Path, text: str) -> tuple[Any, Fits, list[dict[str, Any]]]:
    rng = np.random.default_rng(1)
    shape = (1, 12, 14, 14) if "Conv" in text else (1, 64, 12) if "Erf" in text else (64, 12)
    data = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(24)]
    settings = Settings(kinds=("nystrom",), cache=folder)
    loaded = load(saved(folder, text), data, settings, lambda *_: None)
    return loaded, calibrate(loaded, settings, lambda *_: None), data


def narrower(loaded: Any, width: int) -> list[Decision]:
    first, second = loaded.sites
    return [
        Decision(site.name, site.geometry.op, (site.geometry.outputs, site.geometry.inputs), "nystrom", width,
                 partner=other.name)
        for site, other in ((first, second), (second, first))
    ]  # fmt: skip


@pytest.mark.parametrize("text", [GELU, GEMM, CONV], ids=["gelu", "gemm", "conv"])
def test_copies_and_dead_channels_go_without_loss(tmp_path: Path, text: str) -> None:
    loaded, fits, data = calibrated(tmp_path, text)
    model = rewritten(loaded.file, loaded.sites, fits, narrower(loaded, WIDTH - 3))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, strict_mode=True), full_check=True)
    assert [n.op_type for n in model.graph.node] == [n.op_type for n in loaded.file.model.graph.node]
    sizes = {t.name: list(t.dims) for t in model.graph.initializer}
    assert not [name for name, dims in sizes.items() if WIDTH in dims]
    before, after = (Session(m).run(data[0])[0] for m in (loaded.file.model, model))
    assert np.linalg.norm(after - before) < 2e-3 * np.linalg.norm(before)
    assert loaded.file.sha256 == read_model(loaded.file.path).sha256


@pytest.mark.parametrize("text", [GELU, GEMM, CONV], ids=["gelu", "gemm", "conv"])
def test_the_error_of_the_output_is_the_predicted_one(tmp_path: Path, text: str) -> None:
    """On the samples that were fitted to; a convolution's patches are sampled, and its moments estimates."""
    loaded, fits, _ = calibrated(tmp_path, text)
    width = WIDTH // 2
    model = rewritten(loaded.file, loaded.sites, fits, narrower(loaded, width))
    feeds = list(loaded.calibration)
    before, after = (np.stack([s.run(f)[0] for f in feeds]) for s in (Session(loaded.file.model), Session(model)))
    axis = 2 if text is CONV else -1
    outputs = np.moveaxis(before, axis, -1).reshape(-1, 10)
    power = float(((outputs - outputs.mean(axis=0)) ** 2).sum())  # the mean is corrected: no part of the power
    predicted = fits[loaded.sites[1].name].narrow.relative(width)  # type: ignore[union-attr]
    assert predicted > 0.005
    assert float(((after - before) ** 2).sum()) / power == pytest.approx(predicted, rel=0.15 if text is CONV else 1e-3)


def test_new_nodes_say_who_made_them(tmp_path: Path) -> None:
    loaded, fits, _ = calibrated(tmp_path, GEMM)
    model = rewritten(loaded.file, loaded.sites, fits, narrower(loaded, 8))
    owners = [{p.key: p.value for p in node.metadata_props} for node in model.graph.node]
    assert [o["onnx_lowrank.pass"] for o in owners] == ["nystrom"] * 3
    first, second = (site.name for site in loaded.sites)
    assert [o["onnx_lowrank.site"] for o in owners] == [first, second, second]


def test_one_half_alone_is_refused(tmp_path: Path) -> None:
    loaded, fits, _ = calibrated(tmp_path, GEMM)
    both = narrower(loaded, 8)
    for half in both:
        with pytest.raises(PassError, match="without the other one"):
            rewritten(loaded.file, loaded.sites, fits, [half])
        with pytest.raises(SettingsError, match="its partner"):
            check_matches([half], loaded.sites)
    with pytest.raises(SettingsError, match="its partner"):
        check_matches([both[0], dataclasses.replace(both[1], rank=7)], loaded.sites)
    check_matches(both, loaded.sites)


def test_a_fit_for_another_producer_is_refused(tmp_path: Path) -> None:
    loaded, fits, _ = calibrated(tmp_path, GEMM)
    first, second = loaded.sites
    narrow = fits[second.name].narrow
    assert narrow is not None
    swapped: dict[str, Fit] = {
        first.name: dataclasses.replace(fits[first.name], narrow=dataclasses.replace(narrow, producer=second.name)),
        second.name: dataclasses.replace(fits[second.name], narrow=None),
    }
    with pytest.raises(PassError, match="not the channels of"):
        rewritten(loaded.file, loaded.sites, swapped, narrower(loaded, 8))


@pytest.mark.parametrize("text", [GELU, GEMM, CONV], ids=["gelu", "gemm", "conv"])
def test_a_full_layer_is_what_it_was(tmp_path: Path, text: str) -> None:
    """At full width the fragment computes the same as the original."""
    loaded, fits, data = calibrated(tmp_path, text)
    model = rewritten(loaded.file, loaded.sites, fits, narrower(loaded, WIDTH))
    before, after = (Session(m).run(data[0])[0] for m in (loaded.file.model, model))
    assert np.allclose(before, after, rtol=1e-5, atol=1e-5 * np.abs(before).max())
    graph = Graph(loaded.file.model, loaded.file.folder)
    chain = chain_after(graph, loaded.sites[0], {s.nodes[0]: s for s in loaded.sites})
    assert isinstance(chain, Chain)
    assert len(narrow_positions(chain)) == len(loaded.file.model.graph.node)


LAYERS = {
    "2400 entries": ("Conv", (1200, 2, 1, 1), (3, 1200, 2, 1), True),
    "2402 entries": ("Conv", (1201, 2, 1, 1), (3, 1201, 2, 1), False),
    "2400 inputs": ("MatMul", (2, 2400), (2400, 3), True),
    "2401 inputs": ("MatMul", (2, 2401), (2401, 3), False),
    "a line, one tap": ("Conv", (8, 4, 3), (5, 8, 1), True),
    "a line": ("Conv", (8, 4, 1), (5, 8, 3), False),
    "a volume, one tap": ("Conv", (8, 4, 1, 1, 3), (5, 8, 1, 1, 1), True),
    "a volume": ("Conv", (8, 4, 1, 1, 1), (5, 8, 1, 1, 3), False),
}
"""Operator, weights of the producer and of the reader of a layer, and whether it may become narrower."""


@pytest.mark.parametrize(("op", "first", "second", "taken"), LAYERS.values(), ids=LAYERS)
def test_a_layer_whose_reader_is_too_wide_or_no_image_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str, first: Any, second: Any, taken: bool
) -> None:
    """It is a chain; but no order of its channels is looked for, and a plan for it is refused."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node(op, ["x", "w1"], ["y"]),
        helper.make_node("Relu", ["y"], ["r"]),
        helper.make_node(op, ["r", "w2"], ["z"]),
    ]
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in (first, second)]
    shape = (1, first[1], *(5,) * (len(first) - 2)) if op == "Conv" else (6, first[0])
    values = [helper.make_tensor_value_info(*one) for one in (("x", 1, shape), ("z", 1, [None] * len(shape)))]
    tensors = [numpy_helper.from_array(w, name) for w, name in zip(weights, ("w1", "w2"), strict=True)]
    graph = helper.make_graph(nodes, "layer", values[:1], values[1:], tensors)
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    settings = Settings(kinds=("nystrom",), cache=tmp_path)
    loaded = load(path, [{"x": np.ones(shape, np.float32)} for _ in range(2)], settings, lambda *_: None)
    assert len(disjoint_chains(loaded.graph, loaded.sites)) == 1
    asked: list[str] = []

    def ordered(*given: Any) -> Narrow:
        producer, _, _, mean, taps = given
        asked.append(producer)
        channels = len(mean) // taps
        return Narrow(producer, np.arange(channels), np.zeros(channels), np.zeros(0), mean, taps)

    monkeypatch.setattr(input_fits, "narrowed", ordered)  # its time grows with the cube of the entries
    fits = calibrate(loaded, settings, lambda *_: None)
    producer, consumer = loaded.sites
    assert asked == ([producer.name] if taken else [])
    assert (fits[consumer.name].narrow is not None) is taken
    if not taken:
        with pytest.raises(PassError, match="without the other one"):
            rewritten(loaded.file, loaded.sites, fits, narrower(loaded, 4))
