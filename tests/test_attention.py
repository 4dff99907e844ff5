"""Attention is found as exporters write it, and its metrics are what sums over all pairs of positions say."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnx_lowrank.attention import Attention, attentions
from onnx_lowrank.graph import Graph
from onnx_lowrank.heads import attention_metrics, metrics_of, moments, side_by_side
from onnx_lowrank.linalg import factor_gram
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.runtime import Session

HEADS, WIDTH, LENGTH = 3, 4, 7
CHANNELS = HEADS * WIDTH
BEFORE = (
    '<ir_version: 8, opset_import: ["" : 17]> g (float[1,7,12] x, float[1,1,1,7] mask) => (float[1,7,12] z) '
    "<int64[4] split = {0, 0, 3, 4}, int64[3] merged = {0, 0, 12}, float half = {0.5}> {\n"
)
LINES = {
    "q": "q = MatMul(x, wq) q3 = Reshape(q, split) q4 = Transpose <perm = [0,2,1,3]> (q3)",
    "k": "k = MatMul(x, wk) k3 = Reshape(k, split) k4 = Transpose <perm = [0,2,3,1]> (k3)",
    "v": "v = MatMul(x, wv) v3 = Reshape(v, split) v4 = Transpose <perm = [0,2,1,3]> (v3)",
    "p": "s = MatMul(q4, k4) t = Mul(s, half) u = Add(t, mask) p = Softmax <axis = -1> (u)",
    "o": "m = MatMul(p, v4) m3 = Transpose <perm = [0,2,1,3]> (m) m2 = Reshape(m3, merged) z = MatMul(m2, wo)",
}


def model(**changed: str) -> onnx.ModelProto:
    lines = LINES | changed
    found = onnx.parser.parse_model(BEFORE + "\n".join(lines.values()) + "\n}")
    rng = np.random.default_rng(0)
    for name in ("wq", "wk", "wv", "wo"):
        weight = rng.standard_normal((CHANNELS, CHANNELS)) / CHANNELS**0.5
        found.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), name))
    return found


def found(proto: onnx.ModelProto) -> tuple[Attention, ...]:
    graph = Graph(proto, Path())
    return attentions(graph, survey(graph).sites)


def feeds(count: int = 12) -> list[dict[str, npt.NDArray[np.float32]]]:
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((CHANNELS, CHANNELS)) * np.geomspace(3, 0.3, CHANNELS)
    mask = np.zeros((1, 1, 1, LENGTH), np.float32)
    mask[..., -2:] = -1e4
    return [
        {"x": (rng.standard_normal((1, LENGTH, CHANNELS)) @ mixed / 3).astype(np.float32), "mask": mask}
        for _ in range(count)
    ]


def test_queries_keys_values_and_their_reader_are_found() -> None:
    (one,) = found(model())
    assert (one.queries, one.keys, one.values, one.weights) == ("q4", "k4", "v4", "p")
    assert [site and site.y for site in (one.query, one.key, one.value, one.reader)] == ["q", "k", "v", "z"]


def test_scaled_queries_and_a_shape_that_is_asked_for_do_not_matter() -> None:
    scaled = "q = MatMul(x, wq) n = Shape(q) q0 = Div(q, half) q3 = Reshape(q0, split) " \
             "q4 = Transpose <perm = [0,2,1,3]> (q3)"  # fmt: skip
    (one,) = found(model(q=scaled))
    assert one.query is not None
    assert one.query.y == "q"


@pytest.mark.parametrize(
    ("role", "line"),
    [
        ("query", LINES["q"] + " extra = Relu(q)"),
        ("query", "q = MatMul(x, wq) q0 = Mul(q, x) q3 = Reshape(q0, split) q4 = Transpose <perm = [0,2,1,3]> (q3)"),
        ("query", "q = MatMul(x, wq) q0 = Relu(q) q3 = Reshape(q0, split) q4 = Transpose <perm = [0,2,1,3]> (q3)"),
    ],
    ids=["read elsewhere", "not a scalar", "not only moved"],
)
def test_a_site_behind_anything_else_has_no_metric(role: str, line: str) -> None:
    (one,) = found(model(q=line))
    assert getattr(one, role) is None
    assert one.key is not None


def test_values_need_the_site_that_reads_the_heads() -> None:
    (one,) = found(model(o=LINES["o"].replace("z = MatMul(m2, wo)", "r = Relu(m2) z = MatMul(r, wo)")))
    assert one.value is None
    assert one.query is not None


def test_a_softmax_that_is_no_attention_is_none() -> None:
    assert found(model(p="s = MatMul(q4, k4) p = Relu(s)", o=LINES["o"] + " w = Softmax(x)")) == ()
    assert found(model(o="z = MatMul(x, wo) n = Softmax(p)")) == ()


def seen(proto: onnx.ModelProto) -> tuple[Attention, dict[str, npt.NDArray[np.float32]]]:
    (one,) = found(proto)
    tapped = onnx.ModelProto()
    tapped.CopyFrom(proto)
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in one.tensors)
    return one, dict(zip(one.tensors, Session(tapped).run(feeds(1)[0], list(one.tensors)), strict=True))


def test_moments_are_the_sums_over_all_pairs_of_positions() -> None:
    """Σ p (δ − mean δ)² for errors e of a query, Σ p(1 − p) (q·e)² for those of a key."""
    one, tensors = seen(model())
    p, q, k = (tensors[n].astype(np.float64)[0] for n in (one.weights, one.queries, one.keys))
    result = moments(one, tensors)
    rng = np.random.default_rng(2)
    for head in range(HEADS):
        e = rng.standard_normal(WIDTH)
        of_query = of_key = 0.0
        for i, j in itertools.product(range(LENGTH), range(LENGTH)):
            delta = e @ k[head]
            of_query += p[head, i, j] * (delta[j] - p[head, i] @ delta) ** 2
            of_key += p[head, i, j] * (1 - p[head, i, j]) * (q[head, i] @ e) ** 2
        assert e @ result["query"][head] @ e == pytest.approx(of_query, rel=1e-3)
        assert e @ result["key"][head] @ e == pytest.approx(of_key, rel=1e-3)
        assert result["spread"][head] == pytest.approx(np.sum(p[head] ** 2), rel=1e-5)
    assert result["count"] == LENGTH


def test_channels_that_are_not_heads_side_by_side_have_no_metric() -> None:
    interleaved = LINES["q"].replace("split)", "turned)").replace("[0,2,1,3]", "[0,3,1,2]")
    proto = model(q=interleaved)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 4, 3]), "turned"))
    one, tensors = seen(proto)
    assert set(moments(one, tensors)) == {"key", "spread", "count"}
    heads = np.zeros((1, HEADS, LENGTH, WIDTH), np.float32)
    assert not side_by_side(heads.reshape(1, LENGTH, CHANNELS), heads)  # nothing to see
    assert not side_by_side(np.ones((1, LENGTH, 1), np.float32), heads)


def test_a_run_without_four_axes_says_nothing() -> None:
    (one,) = found(model())
    assert moments(one, {name: np.ones((2, 3), np.float32) for name in one.tensors}) == {}


@pytest.mark.parametrize(("role", "weight"), [("query", "wq"), ("key", "wk"), ("value", "wv")])
def test_the_best_factors_in_the_metric_disturb_the_output_less(role: str, weight: str) -> None:
    proto, data = model(), feeds(60)
    (one,) = found(proto)
    metrics = attention_metrics(proto, Path(), [one], data[:40], bytes_of=lambda _: 1, provider="cpu")
    site = getattr(one, role)
    second = sum(feed["x"][0].T.astype(np.float64) @ feed["x"][0] for feed in data[:40])
    original, losses = Session(proto), []
    for metric in (None, metrics[site.name]):
        weighted = site.weight.astype(np.float64) if metric is None else metric.root @ site.weight
        basis = factor_gram(weighted @ second @ weighted.T).basis[:, :6]
        best = basis @ (basis.T @ weighted)
        changed = onnx.ModelProto()
        changed.CopyFrom(proto)
        for tensor in changed.graph.initializer:
            if tensor.name == weight:
                best = best if metric is None else metric.inverse @ best
                tensor.CopyFrom(numpy_helper.from_array(best.T.astype(np.float32).copy(), weight))
        session = Session(changed)
        losses.append(sum(float(np.sum((session.run(f)[0] - original.run(f)[0]) ** 2)) for f in data[40:]))
    assert losses[1] < 0.9 * losses[0]


def test_values_of_another_width_than_the_reader_have_no_metric() -> None:
    one, tensors = seen(model())
    result = moments(one, tensors)
    assert set(metrics_of(one, result)) == {site.name for site in (one.query, one.key, one.value) if site is not None}
    assert metrics_of(one, {"spread": np.ones(5), "count": np.array(1.0)}) == {}
