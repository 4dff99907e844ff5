"""Random graphs: what no patch touches is the same bytes, and full-rank factors compute the same numbers."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_lowrank.constants import CONSTANT_OPS
from onnx_lowrank.graph import Graph, Patch
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.passes.svd import SVD
from onnx_lowrank.protos import reads, subgraphs
from onnx_lowrank.rewrite import patch_of
from onnx_lowrank.sites import Site

EPS = float(np.finfo(np.float32).eps)
ROWS = 3
STEPS = ("MatMul", "Gemm", "Left", "Bias", "Add", "Max", "Relu", "Identity", "Twin", "If", "FusedMatMul")
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclasses.dataclass
class Builder:
    """A graph under construction; every activation is ROWS × width, and `widths` has them by name."""

    rng: random.Random
    widths: dict[str, int]
    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    weights: dict[str, npt.NDArray[Any]] = dataclasses.field(default_factory=dict)
    stored: list[TensorProto] = dataclasses.field(default_factory=list)

    def constant(self, *shape: int) -> str:
        """An old weight of that shape, or a new one: an initializer or a Constant node, maybe behind a chain."""
        same = [name for name, value in self.weights.items() if value.shape == shape]
        if same and self.rng.random() < 0.2:
            return self.rng.choice(same)
        value = np.random.default_rng(self.rng.getrandbits(32)).standard_normal(shape).astype(np.float32)
        chain = self.rng.choice(["", "", "Identity", "Transpose", "Constant"])
        data = numpy_helper.from_array(value.T if chain == "Transpose" else value, f"w{len(self.weights)}")
        self.weights[data.name if not chain else f"{data.name}_c"] = value
        if chain == "Constant":
            return self.node("Constant", [], f"{data.name}_c", value=data)
        self.stored.append(data)
        return self.node(chain, [data.name], f"{data.name}_c") if chain else data.name

    def node(self, op: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or f"t{len(self.nodes)}"
        name = self.rng.choice(["", "node", f"n{len(self.nodes)}"])
        domain = "com.microsoft" if op == "FusedMatMul" else ""
        doc = self.rng.choice(["", "kept as it is"])
        made = helper.make_node(op, inputs, [output], name=name, domain=domain, doc_string=doc, **attributes)
        if self.rng.random() < 0.3:
            made.metadata_props.add(key="from", value=f"line {len(self.nodes)}")
        self.nodes.append(made)
        return output

    def step(self, op: str) -> None:
        known = list(self.widths.items())
        x, width = known[-1] if self.rng.random() < 0.6 else self.rng.choice(known)
        n = self.rng.randint(1, 6)
        other = self.rng.choice([name for name, size in self.widths.items() if size == width])
        if op == "Twin":
            self.twin()
        elif op == "If":
            self.widths[self.choose(x, width, n)] = n
        elif op in ("MatMul", "FusedMatMul"):
            self.widths[self.node(op, [x, self.constant(width, n)])] = n
        elif op == "Gemm":
            trans_b = self.rng.getrandbits(1)
            inputs = [x, self.constant(*((n, width) if trans_b else (width, n)))]
            bias = self.rng.choice([(), (n,), (1, n), (1,)])
            inputs += [self.constant(*bias)] if bias else []
            self.widths[self.node("Gemm", inputs, transB=trans_b, alpha=self.rng.choice([1.0, 0.7]), beta=0.3)] = n
        elif op == "Left":
            self.widths[self.node("MatMul", [self.constant(ROWS, ROWS), x])] = width
        elif op == "Bias":
            product = self.node("MatMul", [x, self.constant(width, n)])
            self.widths |= {product: n} if self.rng.random() < 0.3 else {}
            self.widths[self.node("Add", self.rng.sample([product, self.constant(n)], 2))] = n
        else:
            self.widths[self.node(op, [x, other] if op in ("Add", "Max") else [x])] = width

    def twin(self) -> None:
        """The last node that made an activation once more: the same name, operator and inputs."""
        old = next((n for n in reversed(self.nodes) if n.output[0] in self.widths), None)
        if old is not None:
            twin = onnx.NodeProto()
            twin.CopyFrom(old)
            twin.output[0] = f"{old.output[0]}_twin"
            if twin.output[0] not in self.widths:
                self.nodes.append(twin)
                self.widths[twin.output[0]] = self.widths[old.output[0]]

    def choose(self, x: str, width: int, n: int) -> str:
        """An If whose branches read an activation and weights from outside."""
        branches = {}
        for name in ("then_branch", "else_branch"):
            result = f"{name}{len(self.nodes)}"
            inner = helper.make_node("MatMul", [x, self.constant(width, n)], [result], name="node")
            value = helper.make_tensor_value_info(result, TensorProto.FLOAT, [ROWS, n])
            branches[name] = helper.make_graph([inner], name, [], [value])
        return self.node("If", ["choice"], **branches)


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    """Valid models that the runtime takes, of every IR version that matters."""
    build = Builder(random.Random(draw(st.integers(0, 2**32 - 1))), {"x": draw(st.integers(1, 6))})
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, build.widths["x"]])]
    for op in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=8)):
        build.step(op)
    rng, ir_version = build.rng, draw(st.sampled_from([3, 8, 10]))
    inputs.append(helper.make_tensor_value_info("choice", TensorProto.BOOL, []))
    listed = [t for t in build.stored if ir_version == 3 or rng.random() < 0.1]
    inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in listed]
    made = [n.output[0] for n in build.nodes if n.output[0] in build.widths]
    graph = helper.make_graph(build.nodes, "random", inputs, [], build.stored, doc_string="a graph")
    read = reads(graph, build.nodes)
    values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, [ROWS, build.widths[n]]) for n in made}
    outputs = [n for n in made if not read[n] or rng.random() < 0.1] or ["x"]
    graph.output.extend(values.get(name, inputs[0]) for name in outputs)
    graph.value_info.extend(v for n, v in values.items() if n not in outputs and rng.random() < 0.5)
    domains = [helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("", 17), helper.make_opsetid("ai.extra", 3)]
    model = helper.make_model(graph, ir_version=ir_version, opset_imports=domains, producer_name="a test")
    helper.set_model_props(model, {"made": "by a test"})
    return model


def full_rank(site: Site) -> Patch:
    u, s, vt = np.linalg.svd(site.weight.astype(np.float64), full_matrices=False)
    return patch_of(site, SVD.build(site.geometry, u * s, vt, site.bias_vector), "svd")


def rewritten(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[Site, ...]]:
    graph = Graph(model, Path())
    sites = survey(graph).sites
    for site in sites:
        graph.apply(full_rank(site))
    return graph.commit(), sites


def run(model: onnx.ModelProto, feed: dict[str, Any]) -> list[npt.NDArray[np.float32]]:
    nameless = onnx.ModelProto()
    nameless.CopyFrom(model)
    for node in nameless.graph.node:  # the runtime, unlike ONNX, refuses two nodes of one name
        node.name = ""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    # Its optimiser loses an output that an Identity hands on, and then refuses the model that it has made.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(nameless.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, feed)]


def magnitudes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every constant replaced by its absolute value: what rounding errors are proportional to."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    graphs = [found.graph, *(body for n in found.graph.node for body in subgraphs(n))]
    constants = [a.t for g in graphs for n in g.node if n.op_type == "Constant" for a in n.attribute]
    for tensor in (*(t for g in graphs for t in g.initializer), *constants):
        tensor.CopyFrom(numpy_helper.from_array(np.abs(numpy_helper.to_array(tensor)), tensor.name))
    return found


def roundings(model: onnx.ModelProto) -> int:
    """Bound on the roundings along any path: a product of inner length k has k, and each factor was stored rounded."""
    bodies = [body for n in model.graph.node for body in subgraphs(n)]
    tensors = [*model.graph.initializer, *(t for body in bodies for t in body.initializer)]
    longest = max([ROWS, *(dim for t in tensors for dim in t.dims)], default=1)
    return (longest + 4) * (len(model.graph.node) + sum(len(body.node) for body in bodies))


def is_new(node: onnx.NodeProto) -> bool:
    return any(p.key == "onnx_lowrank.pass" for p in node.metadata_props)


@QUICK
@given(models(), st.randoms(use_true_random=False), st.booleans())
def test_without_patches_the_model_is_the_same_bytes(model: onnx.ModelProto, rng: random.Random, mixed: bool) -> None:
    if mixed:  # not valid, and no reason to touch it
        nodes = list(model.graph.node)
        rng.shuffle(nodes)
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    before = model.SerializeToString()
    graph = Graph(model, Path())
    survey(graph)
    committed = graph.commit()
    assert committed.SerializeToString() == before == model.SerializeToString()
    assert committed.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


@QUICK
@given(models())
def test_a_survey_mentions_every_node_once(model: onnx.ModelProto) -> None:
    graph = Graph(model, Path())
    found = survey(graph)
    inner = sum(len(a.g.node) for n in model.graph.node for a in n.attribute if n.op_type == "If")
    places = [place for site in found.sites for place in site.places]
    assert len(places) + len(found.kept) == len(model.graph.node) + inner
    taken = [position for place in places for position in place.nodes]
    assert len(taken) == len(set(taken))


@QUICK
@given(models(), st.integers(0, 2**32 - 1))
def test_full_rank_factors_compute_the_same_outputs(model: onnx.ModelProto, seed: int) -> None:
    before = model.SerializeToString()
    onnx.checker.check_model(model, full_check=True)
    after, _ = rewritten(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(after, full_check=True)
    x = np.random.default_rng(seed).standard_normal(
        [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    )
    feed = {"x": x.astype(np.float32), "choice": np.array(bool(seed % 2))}
    bound = run(magnitudes(after), {**feed, "x": np.abs(feed["x"])})
    for expected, found, magnitude in zip(run(model, feed), run(after, feed), bound, strict=True):
        assert np.all(np.abs(expected - found) <= EPS * roundings(after) * magnitude)


@QUICK
@given(models())
def test_nodes_that_no_patch_touches_stay_byte_for_byte_in_order(model: onnx.ModelProto) -> None:
    after, sites = rewritten(model)
    places = [place for site in sites for place in site.places]
    replaced = {position for place in places for position in place.nodes}
    read = reads(after.graph, after.graph.node)
    vanished = {
        i for i, n in enumerate(model.graph.node) if n.op_type in CONSTANT_OPS and not read[n.output[0]]
    }  # every tensor was read before
    expected = [n.SerializeToString() for i, n in enumerate(model.graph.node) if i not in replaced | vanished]
    assert [n.SerializeToString() for n in after.graph.node if not is_new(n)] == expected
    assert sum(map(is_new, after.graph.node)) >= 2 * len(places)
    caller = {i.name for i in model.graph.input if model.ir_version > 3}  # what a caller may set is never dropped
    kept = [t.SerializeToString() for t in model.graph.initializer if read[t.name] or t.name in caller]
    assert [t.SerializeToString() for t in after.graph.initializer][: len(kept)] == kept
    old, new = onnx.ModelProto(), onnx.ModelProto()
    for source, target in ((model, old), (after, new)):
        target.CopyFrom(source)
        for field in ("node", "initializer", "value_info", "input"):
            target.graph.ClearField(field)
    assert old == new
