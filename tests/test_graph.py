"""The graph: who reads what, constants behind chains, patches that are refused, and what vanishes with a patch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper

from onnx_lowrank.errors import PassError
from onnx_lowrank.fragment import Fragment, Op
from onnx_lowrank.graph import Graph, Patch
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.sites import Why

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
W = "float[2, 2] w = {1, 2, 3, 4}"
HALVES = Fragment(
    (Op("down", "MatMul", ("x", "a"), "thin"), Op("up", "MatMul", ("thin", "b"), "y")),
    {"a": np.ones((2, 1), np.float32), "b": np.ones((1, 2), np.float32)},
)
SPLIT = Fragment((Op("only", "MatMul", ("x", "a"), "y"),), {"a": np.ones((2, 2), np.float32)})
BRANCH = (
    "y = If (c) <then_branch = a () => (float[n, 2] p) { p = Relu(t) },"
    " else_branch = b () => (float[n, 2] q) { q = Relu(x) }>"
)
CHAIN = f"""{HEAD} chain (float[n, 2] x) => (float[n, 2] y) <{W}, float[2] b = {{5, 6}}> {{
    t = MatMul(x, w)
    u = Add(t, b)
    y = Relu(u)
}}"""


def graph_of(text: str) -> Graph:
    return Graph(onnx.parser.parse_model(text), Path())


def body(text: str, weights: str = W) -> str:
    return f"{HEAD} main (float[n, 2] x, bool c) => (float[n, 2] y) <{weights}> {{ {text} }}"


def patch(*nodes: int, x: str = "x", y: str = "y", fragment: Fragment = HALVES) -> Patch:
    return Patch("site", nodes, x, y, fragment, "svd")


def names(graph: onnx.GraphProto, field: str) -> list[str]:
    return [v.name for v in getattr(graph, field)]


def ops(model: onnx.ModelProto) -> list[str]:
    return [f"{n.op_type} {' '.join(n.input)} -> {' '.join(n.output)}" for n in model.graph.node]


# Who reads what


CAPTURE = body("""
    y = MatMul(x, w)
    z = If (c) <
        then_branch = outer () => (float[n, 2] p) {
            p = If (c) <
                then_branch = inner () => (float[n, 2] q) { q = MatMul(x, w) },
                else_branch = plain () => (float[n, 2] r) { r = Identity(x) }>
        },
        else_branch = own () => (float[n, 2] s) <float[2, 2] w2 = {1, 2, 3, 4}> { s = MatMul(x, w2) }>""")


def test_a_capture_by_a_body_counts_as_a_reader() -> None:
    graph = graph_of(CAPTURE)
    assert graph.readers("w") == [0, 1]
    assert graph.readers("x") == [0, 1, 1, 1]
    assert graph.readers("c") == [1, 1]
    assert graph.readers("w2") == graph.readers("q") == graph.readers("no such tensor") == []
    assert survey(graph).kept[0].why is Why.IN_BODY


def test_a_captured_weight_and_its_constant_node_outlive_their_reader_in_the_main_graph() -> None:
    graph = graph_of(CAPTURE)
    graph.apply(patch(0))
    assert "w" in names(graph.commit().graph, "initializer")
    graph = graph_of(
        CAPTURE.replace("y = MatMul", "w = Identity(v)\n y = MatMul").replace("float[2, 2] w =", "float[2, 2] v =")
    )
    graph.apply(patch(1))
    committed = graph.commit()
    assert ops(committed)[0] == "Identity v -> w"
    assert names(committed.graph, "initializer")[0] == "v"


def test_readers_and_producers_follow_a_patch() -> None:
    graph = graph_of(CHAIN)
    assert [graph.producer(t) for t in ("x", "w", "t", "u", "y", "nothing")] == [None, None, 0, 1, 2, None]
    graph.apply(patch(0, 1, y="u"))
    assert (graph.readers("x"), graph.readers("w"), graph.readers("t")) == ([1], [], [])
    assert (graph.producer("u"), graph.producer("t")) == (1, None)


def test_a_second_patch_reads_what_the_first_one_makes() -> None:
    graph = graph_of(body("t = MatMul(x, w)\n y = MatMul(t, w)"))
    graph.apply(patch(1, x="t"))
    graph.apply(patch(0, y="t", fragment=SPLIT))
    assert ops(graph.commit()) == [
        "MatMul x site/a_1 -> t",
        "MatMul t site/a -> site/thin",
        "MatMul site/thin site/b -> y",
    ]


def test_patching_one_twin_leaves_the_other() -> None:
    model = onnx.parser.parse_model(
        body("a = MatMul(x, w)\n b = MatMul(x, w)").replace("(float[n, 2] y)", "(float[n, 2] a, float[n, 2] b)")
    )
    for first, second in ((0, 1), (1, 0)):
        for node in model.graph.node:
            node.name = "twin"
        graph = Graph(model, Path())
        assert graph.names == ["a", "b"]
        graph.apply(patch(first, y="ab"[first]))
        assert (graph.readers("w"), graph.producer("ab"[second])) == ([second], second)
        untouched = model.graph.node[second].SerializeToString()
        assert [n.SerializeToString() for n in graph.commit().graph.node if n.name == "twin"] == [untouched]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = Softmax(x)", ["x"]),
        ("y = LogSoftmax(x)", ["x"]),
        ("y = Sigmoid(x)", ["x"]),
        ("t = Softmax(x)\n y = Relu(t)", ["y"]),
        ("t = Relu(x)\n y = Softmax(t)", ["t"]),
    ],
)
def test_a_squashed_output_is_judged_by_what_enters_it(text: str, expected: list[str]) -> None:
    assert graph_of(body(text)).smooth_outputs() == expected


def test_one_tensor_is_judged_once() -> None:
    text = body("y = Softmax(x)\n z = Sigmoid(x)").replace("(float[n, 2] y)", "(float[n, 2] y, float[n, 2] z, bool c)")
    assert graph_of(text).smooth_outputs() == ["x", "c"]


# Constants


ROW = "s = Constant <value = int64[2] {4, 1}> ()"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", [[1, 2], [3, 4]]),
        ("k = Identity(w)", [[1, 2], [3, 4]]),
        ("k = Transpose(w)", [[1, 3], [2, 4]]),
        ("k = Transpose <perm = [0, 1]> (w)", [[1, 2], [3, 4]]),
        ("k = Cast <to = 10> (w)", [[1, 2], [3, 4]]),
        ("a = Transpose(w)\n b = Cast <to = 11> (a)\n k = Identity(b)", [[1, 3], [2, 4]]),
        ("k = Constant <value = float[2, 2] {5, 6, 7, 8}> ()", [[5, 6], [7, 8]]),
        ("a = Constant <value = float[2, 2] {5, 6, 7, 8}> ()\n k = Transpose(a)", [[5, 7], [6, 8]]),
        (f"{ROW} k = Reshape(w, s)", [[1], [2], [3], [4]]),
        (f"{ROW.replace('4, 1', '-1, 4')} k = Reshape(w, s)", [[1, 2, 3, 4]]),
        (f"{ROW.replace('4, 1', '0, 2')} k = Reshape(w, s)", [[1, 2], [3, 4]]),
        ("s = Constant <value_ints = [1, 4]> () k = Reshape(w, s)", [[1, 2, 3, 4]]),
        ("s = Constant <value_ints = [-1]> () a = Unsqueeze(w, s) k = Squeeze(a, s)", [[1, 2], [3, 4]]),
        ("s = Constant <value_ints = [0, 3]> () k = Unsqueeze(w, s)", [[[[1], [2]], [[3], [4]]]]),
        ("s = Constant <value_ints = [0, 3]> () a = Unsqueeze(w, s) k = Squeeze(a)", [[1, 2], [3, 4]]),
        ("a = Transpose(w) k = Flatten <axis = 0> (a)", [[1, 3, 2, 4]]),
        ("k = Constant <value_float = 2.5> ()", 2.5),
        ("k = Constant <value_floats = [1.5, 2.5]> ()", [1.5, 2.5]),
    ],
)
def test_a_constant_is_evaluated_and_vanishes_with_its_only_reader(text: str, value: object) -> None:
    name = "k" if text else "w"
    graph = graph_of(body(f"{text}\n y = MatMul(x, {name})"))
    found = graph.constants.value(name)
    assert found is not None
    assert np.array_equal(found, np.asarray(value))
    assert found.dtype == {"10": "float16", "11": "float64"}.get(text.partition("to = ")[2][:2], "float32")
    graph.apply(patch(len(graph.protos) - 1))
    committed = graph.commit()
    assert ops(committed) == ["MatMul x site/a -> site/thin", "MatMul site/thin site/b -> y"]
    never_read = ["w"] if "w" not in {i for n in graph.protos for i in n.input} else []
    assert names(committed.graph, "initializer") == [*never_read, "site/a", "site/b"]


@pytest.mark.parametrize(
    "text",
    [
        "k = Relu(w)",
        "k = Transpose(x)",
        "k = Constant <value_int = 1> ()",
        "k = Constant <value_ints = [1]> ()",
        "s = Shape(x) k = Reshape(w, s)",
        "s = Constant <value_ints = [3]> () k = Reshape(w, s)",
        "s = Constant <value_ints = [0, 0, 0]> () k = Reshape(w, s)",
        "s = Constant <value_floats = [4.0]> () k = Reshape(w, s)",
        "s = Constant <value_string = 'a'> () k = Reshape(w, s)".replace("'", '"'),
        "s = Constant <value_ints = [7]> () k = Unsqueeze(w, s)",
        "s = Constant <value_ints = [0]> () k = Squeeze(w, s)",
        "k = Reshape(w)",
    ],
)
def test_what_is_computed_is_not_a_constant(text: str) -> None:
    assert graph_of(body(f"{text}\n y = MatMul(x, k)")).constants.value("k") is None


def test_a_constant_read_elsewhere_stays_and_so_does_one_that_was_never_read() -> None:
    weights = f"{W}, float[1] dead = {{1}}"
    graph = graph_of(body("k = Transpose(w)\n u = Identity(dead)\n t = MatMul(x, k)\n y = MatMul(t, k)", weights))
    graph.apply(patch(2, y="t"))
    committed = graph.commit()
    assert ops(committed)[:2] == ["Transpose w -> k", "Identity dead -> u"]
    assert names(committed.graph, "initializer") == ["w", "dead", "site/a", "site/b"]
    graph.apply(patch(3, x="t"))
    assert names(graph.commit().graph, "initializer")[0] == "dead"
    assert names(graph.commit().graph, "initializer")[1] != "w"


def test_a_constant_that_is_an_output_stays() -> None:
    text = body("k = Transpose(w)\n y = MatMul(x, k)").replace("(float[n, 2] y)", "(float[n, 2] y, float[2, 2] k)")
    graph = graph_of(text)
    graph.apply(patch(1))
    assert ops(graph.commit())[0] == "Transpose w -> k"


# Patches


def test_new_nodes_stand_where_the_last_old_one_stood() -> None:
    graph = graph_of(body("k = Transpose(w)\n s = Relu(x)\n y = MatMul(s, k)"))
    graph.apply(patch(0, 2, x="s"))
    assert ops(graph.commit()) == ["Relu x -> s", "MatMul s site/a -> site/thin", "MatMul site/thin site/b -> y"]


def test_a_node_is_replaced_only_once() -> None:
    graph = graph_of(CHAIN)
    graph.apply(patch(0, y="t"))
    with pytest.raises(PassError, match="svd at site: its node was already replaced"):
        graph.apply(patch(0, 1, y="u"))


@pytest.mark.parametrize(
    "text",
    [
        "t = MatMul(x, w)\n u = Add(t, x)\n y = Add(u, t)",
        f"t = MatMul(x, w)\n u = Add(t, x)\n {BRANCH}",
        "t = MatMul(x, w)\n y = Add(t, x)",
    ],
)
def test_a_tensor_that_is_read_elsewhere_is_not_swallowed(text: str) -> None:
    last = "u" if "u =" in text else "y"
    outputs = "(float[n, 2] y, float[n, 2] t)" if last == "y" else "(float[n, 2] y)"
    graph = graph_of(body(text).replace("(float[n, 2] y)", outputs))
    with pytest.raises(PassError, match="tensor 't' between its nodes is read elsewhere"):
        graph.apply(patch(0, 1, y=last))


DOWN, UP = HALVES.ops


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        ((UP, DOWN), "node 'up' of the fragment is not sorted or not single-assigned"),
        ((DOWN, DOWN, UP), "node 'down' of the fragment is not sorted or not single-assigned"),
        ((Op("o", "MatMul", ("x", "a"), "a"), UP), "node 'o' of the fragment is not sorted"),
        ((Op("o", "MatMul", ("x", "a"), "x"), UP), "node 'o' of the fragment is not sorted"),
        ((DOWN, Op("o", "MatMul", ("thin", "no such constant"), "y")), "node 'o' of the fragment is not sorted"),
        ((DOWN,), "the fragment does not produce its output"),
        ((), "the fragment does not produce its output"),
    ],
)
def test_a_fragment_that_does_not_lead_from_x_to_y_is_refused(broken: tuple[Op, ...], match: str) -> None:
    graph = graph_of(CHAIN)
    with pytest.raises(PassError, match=match):
        graph.apply(patch(0, y="t", fragment=Fragment(broken, HALVES.constants)))
    assert graph.commit() == graph.model


def test_an_x_that_does_not_exist_is_refused() -> None:
    graph = graph_of(CHAIN)
    with pytest.raises(PassError, match="tensor 'nowhere' does not exist"):
        graph.apply(patch(0, x="nowhere", y="t"))
    assert graph.commit() == graph.model


def test_new_names_never_collide() -> None:
    model = onnx.parser.parse_model(body(f"t = MatMul(x, w)\n s = Relu(t)\n {BRANCH}"))
    model.graph.node[1].name = "site/down"
    model.graph.node[2].attribute[0].g.node[0].name = "site/up"
    model.graph.node[2].attribute[1].g.initializer.append(helper.make_tensor("site/a", TensorProto.FLOAT, [1], [0]))
    model.graph.value_info.append(helper.make_tensor_value_info("site/thin", TensorProto.FLOAT, [1]))
    graph = Graph(model, Path())
    graph.apply(patch(0, y="t"))
    new = graph.commit().graph
    assert names(new, "node")[:2] == ["site/down_1", "site/up_1"]
    assert names(new, "initializer") == ["site/a_1", "site/b"]
    assert [list(n.output) for n in new.node[:2]] == [["site/thin_1"], ["t"]]
    assert [graph.fresh(base) for base in ("w", "new", "new", "p", "y")] == ["w_1", "new", "new_1", "p_1", "y_1"]


def test_new_nodes_say_who_made_them_and_keep_where_they_came_from() -> None:
    model = onnx.parser.parse_model(CHAIN)
    model.graph.node[0].metadata_props.add(key="source", value="model.py:3")
    graph = Graph(model, Path())
    graph.apply(patch(0, 1, y="u"))
    new = graph.commit().graph.node
    told = {"source": "model.py:3", "onnx_lowrank.pass": "svd", "onnx_lowrank.site": "site"}
    assert [{p.key: p.value for p in n.metadata_props} for n in new] == [told, told, {}]


@pytest.mark.parametrize("ir_version", [3, 4])
def test_before_ir_4_initializers_are_listed_as_inputs(ir_version: int) -> None:
    model = onnx.parser.parse_model(CHAIN)
    model.ir_version = ir_version
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    )
    graph = Graph(model, Path())
    assert graph.constants.overridable == (set() if ir_version == 3 else {"x", "w", "b"})
    graph.apply(patch(0, y="t"))
    new = graph.commit()
    new_inputs, kept = (["site/a", "site/b"], []) if ir_version == 3 else ([], ["w"])
    assert names(new.graph, "input") == ["x", *kept, "b", *new_inputs]
    assert names(new.graph, "initializer") == [*kept, "b", "site/a", "site/b"]
    onnx.checker.check_model(new, full_check=True)


def test_value_infos_go_only_with_their_tensor() -> None:
    model = onnx.parser.parse_model(CHAIN)
    for name in ("t", "w", "b", "u", "made up"):
        model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]))
    graph = Graph(model, Path())
    graph.apply(patch(0, 1, y="u"))
    assert names(graph.commit().graph, "value_info") == ["u", "made up"]
    assert names(model.graph, "value_info") == ["t", "w", "b", "u", "made up"]
