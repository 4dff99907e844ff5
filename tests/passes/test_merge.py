"""Neighbours multiplied: the outputs stay, the work never grows, a second time changes nothing."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnx_lowrank import measure
from onnx_lowrank.errors import SettingsError
from onnx_lowrank.files import ModelFile
from onnx_lowrank.latency import fragment_model
from onnx_lowrank.merging import Pair, Read, merged, read, seen
from onnx_lowrank.passes.merge import Apart, Merge, merges
from onnx_lowrank.plan import Plan
from onnx_lowrank.prepare import load
from onnx_lowrank.rewrite import check_matches
from onnx_lowrank.runtime import Session, profile
from onnx_lowrank.settings import Settings

Array = npt.NDArray[Any]
EPS = float(np.finfo(np.float32).eps)
ANYWHERE = Settings(precision="fp16")  # nothing is timed: fewer multiply-adds decide


@dataclasses.dataclass
class Builder:
    """A model under construction; `x` is its input."""

    x: Array
    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    weights: dict[str, Array] = dataclasses.field(default_factory=dict)
    outputs: list[str] = dataclasses.field(default_factory=list)
    seed: int = 0

    def node(self, op: str, inputs: list[Any], output: str, **attributes: Any) -> Builder:
        """Arrays among the inputs, and tuples as shapes of random ones, become constants."""
        names = []
        for given_ in inputs:
            if not isinstance(given_, str):
                rng = np.random.default_rng([self.seed, len(self.weights)])
                array = rng.standard_normal(given_) / 2 if isinstance(given_, tuple) else given_
                name = f"w{len(self.weights)}"
                self.weights[name] = array.astype(self.x.dtype)
                names.append(name)
            else:
                names.append(given_)
        self.nodes.append(helper.make_node(op, names, [output], name=f"n{len(self.nodes)}", **attributes))
        return self

    def file(self) -> ModelFile:
        kind = helper.np_dtype_to_tensor_dtype(self.x.dtype)
        graph = helper.make_graph(
            self.nodes, "g",
            [helper.make_tensor_value_info("x", kind, self.x.shape)],
            [helper.make_tensor_value_info(n, kind, None) for n in (*self.outputs, self.nodes[-1].output[0])],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return ModelFile(Path("m.onnx"), model, "", 0, external=False)


def image(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape or (2, 6, 9, 8)).astype(np.float32)


def matrix(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape or (5, 6)).astype(np.float32)


def run(model: onnx.ModelProto, x: Array) -> list[Array]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(output, np.float64) for output in session.run(None, {"x": x})]


def together(builder: Builder, planned: list[Pair] | None = None) -> tuple[Read, list[tuple[str, str]]]:
    feeds = [{"x": builder.x}]
    known, done = merged(read(builder.file(), feeds), feeds, ANYWHERE, lambda *_: True, planned)
    return known, [(one.taken_in, one.node) for one in done]


def macs(model: onnx.ModelProto, x: Array) -> int:
    return measure.multiply_adds(profile(model, {"x": x}, folder=Path()))


def same(before: list[Array], after: list[Array], roundings: int) -> bool:
    return all(
        a.shape == b.shape and np.abs(a - b).max(initial=0) <= roundings * EPS * max(1, np.abs(a).max(initial=0))
        for a, b in zip(before, after, strict=True)
    )


CHAINS: dict[str, Builder] = {
    "1x1 after 3x3": Builder(image())
    .node("Conv", ["x", (7, 6, 3, 3), (7,)], "t", pads=[1, 2, 1, 0], strides=[2, 1], dilations=[1, 2])
    .node("Conv", ["t", (4, 7, 1, 1), (4,)], "y"),
    "1x1 with a stride": Builder(image())
    .node("Conv", ["x", (7, 6, 3, 3)], "t", pads=[1, 1, 1, 1], strides=[1, 2])
    .node("Conv", ["t", (4, 7, 1, 1), (4,)], "y", strides=[2, 3]),
    "1x1 after 1x1": Builder(image())
    .node("Conv", ["x", (9, 6, 1, 1), (9,)], "t", pads=[1, 1, 0, 0])
    .node("Conv", ["t", (4, 9, 1, 1), (4,)], "y"),
    "same": Builder(image())
    .node("Conv", ["x", (7, 6, 3, 3), (7,)], "t", auto_pad="SAME_LOWER", strides=[2, 2])
    .node("Conv", ["t", (4, 7, 1, 1)], "y"),
    "3x3 after 1x1": Builder(image())
    .node("Conv", ["x", (9, 6, 1, 1), (9,)], "t")
    .node("Conv", ["t", (8, 9, 3, 2), (8,)], "y", strides=[1, 2], dilations=[2, 1]),
    "padded 3x3 after 1x1 without bias": Builder(image())
    .node("Conv", ["x", (9, 6, 1, 1)], "t")
    .node("Conv", ["t", (8, 9, 3, 3), (8,)], "y", pads=[1, 1, 1, 1]),
    "norms": Builder(image())
    .node("Conv", ["x", (7, 6, 3, 3)], "t")
    .node("BatchNormalization", ["t", (7,), (7,), (7,), np.ones(7)], "u")
    .node("Conv", ["u", (4, 7, 1, 1), (4,)], "v")
    .node("BatchNormalization", ["v", (4,), (4,), (4,), np.ones(4)], "y"),
    "line": Builder(image(2, 6, 20))
    .node("Conv", ["x", (7, 6, 5), (7,)], "t", pads=[2, 2])
    .node("Conv", ["t", (4, 7, 1), (4,)], "y"),
    "MatMuls": Builder(matrix(2, 5, 6))
    .node("MatMul", ["x", (6, 9)], "t")
    .node("Add", ["t", (9,)], "u")
    .node("MatMul", ["u", (9, 4)], "y"),
    "three MatMuls": Builder(matrix(2, 5, 6))
    .node("MatMul", ["x", (6, 12)], "t")
    .node("MatMul", ["t", (12, 9)], "u")
    .node("MatMul", ["u", (9, 4)], "y"),
    "MatMuls on the left": Builder(matrix(2, 6, 5))
    .node("MatMul", [(9, 6), "x"], "t")
    .node("MatMul", [(4, 9), "t"], "y"),
    "Gemms": Builder(matrix(6, 5))
    .node("Gemm", ["x", (9, 6), (9,)], "t", transA=1, transB=1, alpha=0.5, beta=2.0)
    .node("Gemm", ["t", (9, 4), (4,)], "y", alpha=3.0),
    "MatMul and Gemm": Builder(matrix()).node("MatMul", ["x", (6, 9)], "t").node("Gemm", ["t", (9, 4), (4,)], "y"),
    "Gemm and MatMul": Builder(matrix()).node("Gemm", ["x", (6, 9), (9,)], "t").node("MatMul", ["t", (9, 4)], "y"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_neighbours_become_one_node_that_computes_the_same(name: str) -> None:
    builder = CHAINS[name]
    before = builder.file().model
    known, done = together(builder)
    linear = [n for n in known.file.model.graph.node if n.op_type in ("Conv", "MatMul", "Gemm")]
    assert len(linear) == 1
    assert len(done) == len([n for n in before.graph.node if n.op_type in ("Conv", "MatMul", "Gemm")]) - 1
    assert linear[0].name in {n.name for n in before.graph.node}
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(known.file.model, strict_mode=True), full_check=True)
    assert same(run(before, builder.x), run(known.file.model, builder.x), 200)
    assert macs(known.file.model, builder.x) < macs(before, builder.x)


def chain(*attributes: dict[str, Any], second: tuple[int, ...] = (4, 7, 1, 1)) -> Builder:
    one, two = attributes
    builder = Builder(image()).node("Conv", ["x", (7, 6, 3, 3), (7,)], "t", **one)
    return builder.node("Conv", ["t", second, (4,)], "y", **two)


APART: list[tuple[Apart, Builder]] = [
    (
        Apart.KINDS,
        Builder(image()).node("Conv", ["x", (8, 3, 1, 1)], "t", group=2).node("Conv", ["t", (4, 8, 1, 1)], "y"),
    ),
    (Apart.KINDS, Builder(matrix(3, 5, 6)).node("MatMul", ["x", (1, 6, 9)], "t").node("MatMul", ["t", (9, 4)], "y")),
    (Apart.KINDS, Builder(matrix(3, 6, 9)).node("MatMul", [(4, 6), "x"], "t").node("MatMul", ["t", (9, 4)], "y")),
    (Apart.KINDS, Builder(matrix(6, 5)).node("MatMul", [(9, 6), "x"], "t").node("Gemm", ["t", (9, 4)], "y", transA=1)),
    (
        Apart.KINDS,
        Builder(image()).node("Conv", ["x", (9, 6, 1, 1)], "t").node("ConvTranspose", ["t", (9, 4, 2, 2)], "y"),
    ),
    (Apart.KINDS, Builder(image(9, 8, 4, 6)).node("MatMul", ["x", (6, 9)], "t").node("Conv", ["t", (4, 8, 1, 1)], "y")),
    (Apart.KERNELS, chain({}, {}, second=(4, 7, 3, 3))),
    (
        Apart.BIAS,
        Builder(image())
        .node("Conv", ["x", (9, 6, 1, 1), (9,)], "t")
        .node("Conv", ["t", (4, 9, 3, 3)], "y", pads=[1] * 4),
    ),
    (
        Apart.BIAS,
        Builder(image())
        .node("Conv", ["x", (9, 6, 1, 1), (9,)], "t")
        .node("Conv", ["t", (4, 9, 3, 3)], "y", auto_pad="SAME_UPPER"),
    ),
    (Apart.STRIDES, chain({}, {"pads": [1, 0, 0, 0]})),
    (Apart.STRIDES, chain({"auto_pad": "SAME_UPPER"}, {"strides": [2, 1]})),
    (
        Apart.STRIDES,
        Builder(image()).node("Conv", ["x", (9, 6, 1, 1)], "t", strides=[2, 2]).node("Conv", ["t", (4, 9, 3, 3)], "y"),
    ),
    (
        Apart.STRIDES,
        Builder(image()).node("Conv", ["x", (9, 6, 1, 1)], "t", pads=[1] * 4).node("Conv", ["t", (4, 9, 3, 3)], "y"),
    ),
    (
        Apart.RANGE,
        Builder(matrix().astype(np.float16) / 1000)
        .node("MatMul", ["x", np.full((6, 9), 200.0)], "t")
        .node("MatMul", ["t", np.full((9, 4), 200.0)], "y"),
    ),
    (Apart.COST, Builder(matrix()).node("MatMul", ["x", (6, 2)], "t").node("MatMul", ["t", (2, 9)], "y")),
]  # fmt: skip


def found_in(builder: Builder) -> list[Any]:
    known = read(builder.file(), [{"x": builder.x}])
    sites = [seen(site, known.runs) for site in known.found.sites]
    work = {s.name: measure.multiply_adds({s.nodes[0]: known.runs[0][s.nodes[0]]}) for s in sites}
    return list(merges(known.graph, sites, work, lambda one: one.is_cheaper))


@pytest.mark.parametrize(("why", "builder"), APART, ids=[f"{i} {why.name}" for i, (why, _) in enumerate(APART)])
def test_neighbours_stay_two_for_a_reason(why: Apart, builder: Builder) -> None:
    ((first, second, found),) = found_in(builder)
    assert (first.name, second.name, found) == ("n0", "n1", why)
    known, done = together(builder)
    assert (done, known.file.model.SerializeToString()) == ([], builder.file().model.SerializeToString())


def test_every_reason_is_reached() -> None:
    assert {why for why, _ in APART} == set(Apart)


@pytest.mark.parametrize("seer", ["output", "reader"])
def test_what_something_else_sees_stays(seer: str) -> None:
    builder = Builder(matrix()).node("MatMul", ["x", (6, 9)], "t").node("MatMul", ["t", (9, 4)], "y")
    if seer == "output":
        builder.outputs.append("t")
    else:
        builder.node("ReduceSum", ["t"], "s", keepdims=0).node("Add", ["y", "s"], "z")
    assert together(builder)[1] == []


# Random chains


@st.composite
def builders(draw: st.DrawFn) -> Builder:
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))
    images = rng.random() < 0.6
    width = rng.randint(1, 6)
    builder = Builder(image(2, width, 7, 8) if images else matrix(5, width), seed=rng.getrandbits(32))
    name = "x"
    for i in range(rng.randint(2, 6)):
        fresh, n, output = f"t{i}", rng.randint(1, 6), rng.random() < 0.1
        bias = [(n,)] if rng.random() < 0.6 else []
        if rng.random() < 0.15:
            builder.node("Relu", [name], fresh)
        elif images:
            k = rng.choice([1, 1, 1, 2])
            pads = [rng.randint(0, 1) for _ in range(4)] if rng.random() < 0.4 else [0] * 4
            strides = [rng.choice([1, 1, 2]) for _ in range(2)] if i < 2 else [1, 1]
            pads = [max(p, k - 1) for p in pads]
            builder.node("Conv", [name, (n, width, k, k), *bias], fresh, pads=pads, strides=strides)
            width = n
        else:
            op = rng.choice(["MatMul", "Gemm"])
            builder.node(op, [name, (width, n), *(bias if op == "Gemm" else [])], fresh)
            width = n
        if output:
            builder.outputs.append(fresh)
        name = fresh
    builder.outputs = [o for o in builder.outputs if o != name]
    return builder


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(builders())
def test_outputs_stay_work_never_grows_and_twice_is_once(builder: Builder) -> None:
    before = builder.file().model
    known, done = together(builder)
    after = known.file.model
    assert same(run(before, builder.x), run(after, builder.x), 2000)
    assert macs(after, builder.x) <= macs(before, builder.x)
    assert len(after.graph.node) == len(before.graph.node) - len(done)
    feeds = [{"x": builder.x}]
    again, more = merged(known, feeds, ANYWHERE, lambda *_: True, None)
    assert (again, more) == (known, ())
    replayed, same_pairs = together(builder, done)
    assert same_pairs == done
    assert replayed.file.model.SerializeToString() == after.SerializeToString()


# In a run


def test_a_pair_is_timed_as_it_is_and_as_its_product() -> None:
    builder = CHAINS["1x1 after 3x3"]
    (found,) = found_in(builder)
    assert isinstance(found, Merge)
    expected = run(builder.file().model, builder.x)[0]
    for fragment in (found.pair(), found.whole()):
        model = fragment_model(fragment, found.product.geometry)
        assert np.asarray(Session(model).run({"x": builder.x})[0]) == pytest.approx(expected, abs=1e-4)
    assert len(found.pair().ops) == 2


def saved(folder: Path) -> tuple[Path, list[dict[str, Array]]]:
    x = matrix(64, 96)
    builder = Builder(x).node("MatMul", ["x", (96, 512)], "t").node("MatMul", ["t", (512, 64)], "y")
    path = folder / "m.onnx"
    path.write_bytes(builder.file().model.SerializeToString())
    return path, [{"x": x + i} for i in range(4)]


def test_load_multiplies_unless_it_is_told_not_to_or_may_not(tmp_path: Path) -> None:
    path, data = saved(tmp_path)

    def names(**choices: Any) -> tuple[list[str], int]:
        found = load(path, data, Settings(cache=tmp_path / "cache", **choices), lambda *_: None)
        return [site.name for site in found.sites], len(found.merged)

    assert names() == (["n1"], 1)
    assert names(merge=False) == (["n0", "n1"], 0)
    assert names(exclude=("n0",)) == (["n1"], 0)


def test_a_plan_multiplies_what_it_has_multiplied_and_nothing_else(tmp_path: Path) -> None:
    path, data = saved(tmp_path)
    where = Settings(cache=tmp_path / "cache")
    assert [s.name for s in load(path, data, where, lambda *_: None, ()).sites] == ["n0", "n1"]
    replayed = load(path, data, Settings(merge=False), lambda *_: None, [("n0", "n1")])
    assert [s.name for s in replayed.sites] == ["n1"]
    with pytest.raises(SettingsError, match="takes 'n1' into 'n0', which are no such neighbours"):
        load(path, data, where, lambda *_: None, [("n1", "n0")])
    plan = Plan("", (), 0.01, "cpu", 1, 0, 4, merges=(("n0", "n1"),))
    assert Plan.from_json(plan.to_json()).merges == plan.merges
    check_matches((), replayed.sites)
