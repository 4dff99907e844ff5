"""A Loop or Scan whose body runs equally often for all samples, unrolled into the main graph while a model is planned.

    before   y, z = Loop (m, c, x) < body: h → t = Op(h, w);  o = Relu(t);  s = Abs(t) >     state h, o; s is stacked
    opened   h = Identity(x);    t = Op(h, w);    o = Relu(t);    s = Abs(t);
             h@2 = Identity(o);  t@2 = Op(h@2, w);  o@2 = Relu(t@2);  s@2 = Abs(t@2);
             y = Identity(o@2);  z = Concat(Unsqueeze(s), Unsqueeze(s@2))

All runs read the same weight, so that they are one site with twins: one decision, one fit on the inputs of all runs.
Constants that the body makes or turns are made once, in the first run. Closed again (`borders`), the body is that of
the first run. How often the file's body runs is still for its own condition to say.
Left alone: bodies with bodies of their own, with quantization annotations or with names that stand elsewhere too, Scan
of operator set 8, a number of the run that is no scalar.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_lowrank.borders import Step, body_of, exit_name, refill, result
from onnx_lowrank.constants import Constants, is_constant_op
from onnx_lowrank.protos import BORDER, all_names, attribute, opset_of, outer_reads, subgraphs, unique_names

LOOPS: Final = ("Loop", "Scan")
_BODY: Final = "body"
_MOST_RUNS, _MOST_NODES = 64, 4096
_SCAN = 9  # operator set in which Scan lost its batch
_AXES_AS_INPUT = 13  # operator set in which Unsqueeze got its axes as an input


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the inputs and outputs of a Loop or Scan meet those of its body.

    Attributes:
        inputs: of the node, as many as those of the body; a Loop's trip count and condition are the first two, "" where
            there is none.
        carried: position of the first state, among the inputs of the body and among its outputs.
        states: how many.
        sliced: axis and whether it goes backwards, of every input after the states, which is read slice by slice.
        stacked: the same of every output after the states.
    """

    inputs: tuple[str, ...]
    carried: tuple[int, int]
    states: int
    sliced: tuple[tuple[int, bool], ...]
    stacked: tuple[tuple[int, bool], ...]


def counted(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The model with one more output of every given Loop and Scan, as long as its body runs often.

    Returns:
        The model, and the name of that tensor by the node's first output.
    """
    copy, names = onnx.ModelProto(), dict[str, str]()
    copy.CopyFrom(model)
    wanted = {result(node) for node in nodes}
    for node in copy.graph.node:
        if node.op_type not in LOOPS or not wanted.intersection(node.output):
            continue
        name = names[result(node)] = f"{BORDER}_runs/{result(node)}"
        node.output.append(name)
        body = body_of(node, _BODY)
        one = numpy_helper.from_array(np.array(1, np.int64))
        body.node.append(helper.make_node("Constant", [], [f"{name}/one"], value=one))
        body.output.append(helper.make_tensor_value_info(f"{name}/one", onnx.TensorProto.INT64, []))
        for found in node.attribute:
            if found.name in ("scan_output_axes", "scan_output_directions"):
                found.ints.append(0)
    return copy, names


def is_small(node: onnx.NodeProto, count: int) -> bool:
    """Whether a Loop or Scan is worth unrolling at so many runs."""
    return 0 < count <= _MOST_RUNS and count * len(body_of(node, _BODY).node) <= _MOST_NODES


def unrolled(model: onnx.ModelProto, position: int, count: int) -> tuple[onnx.ModelProto, Step] | None:
    """The model with the runs of a body in the place of its Loop or Scan; None where that is left alone."""
    nodes, node = list(model.graph.node), onnx.NodeProto()
    node.CopyFrom(nodes[position])
    body, layout = body_of(node, _BODY), _layout(node, opset_of(model))
    if layout is None or count < 1 or not _is_plain(body):
        return None
    flat = onnx.ModelProto()
    flat.CopyFrom(model)
    del flat.graph.node[position]
    runs = _names(model, body, count)
    labels = unique_names(list(body.node))
    again = {_again(label, run) for label in labels for run in range(1, count)}
    clash = {name for names in runs for name in names.values()} | {t.name for t in body.initializer} | again
    if clash & (all_names(flat) | set(node.output)):
        return None
    made = _Border(model, node, layout, runs)
    for run, names in enumerate(runs):
        made.enter(run)
        for inner, label in zip(body.node, labels, strict=True):
            if run == 0 or not all(names.get(name) == name for name in inner.output if name):
                made.nodes.append(inner if run == 0 else _renamed(inner, names, _again(label, run)))
        made.watch(run)
    made.leave()
    refill(flat.graph.node, [*nodes[:position], *made.nodes, *nodes[position + 1 :]])
    flat.graph.initializer.extend(body.initializer)
    return flat, Step.of(flat, node, count, _BODY, made.marks - {exit_name(result(node))}, runs, again)


def _layout(node: onnx.NodeProto, version: int) -> _Layout | None:
    """None where the node and its body do not fit together."""
    body = body_of(node, _BODY)
    if node.op_type == "Loop":
        inputs, carried = (*node.input, *[""] * (2 - len(node.input))), (2, 1)
    else:
        inputs, carried = tuple(node.input), (0, 0)
    states = len(inputs) - carried[0] - attribute(node, "num_scan_inputs", 0)
    sliced = _axes(node, "input", len(inputs) - carried[0] - states)
    stacked = _axes(node, "output", len(body.output) - carried[1] - states)
    fits = len(inputs) == len(body.input) and len(node.output) == states + len(stacked)
    whole = fits and all(inputs[carried[0] :]) and len(node.output) + carried[1] == len(body.output)
    if any(len(i.type.tensor_type.shape.dim) for i in body.input[: carried[0]]):  # the number of a run is made a scalar
        return None
    if not whole or states < 0 or (node.op_type == "Scan" and version < _SCAN):
        return None
    return _Layout(inputs, carried, states, sliced, stacked)


def _axes(node: onnx.NodeProto, what: str, count: int) -> tuple[tuple[int, bool], ...]:
    """Axis and direction of what a Scan slices or stacks."""
    lists = (attribute(node, f"scan_{what}_{part}", None) or [0] * count for part in ("axes", "directions"))
    return tuple((int(axis), bool(back)) for axis, back in zip(*lists, strict=False))[: max(count, 0)]


def _is_plain(body: onnx.GraphProto) -> bool:
    """Whether a body has no bodies inside it, and makes what it gives back."""
    inputs = {i.name for i in body.input}
    own = inputs | {name for n in body.node for name in n.output} | {t.name for t in body.initializer}
    listed = inputs.intersection(t.name for t in body.initializer)
    nested = any(True for n in body.node for _ in subgraphs(n))
    told = body.sparse_initializer or body.quantization_annotation
    return not (nested or listed or told) and own.issuperset(o.name for o in body.output)


def _names(model: onnx.ModelProto, body: onnx.GraphProto, count: int) -> list[dict[str, str]]:
    """What the tensors of a body are called at every run; what is constant there keeps its name."""
    known = Constants(model, Path())
    held = {t.name for t in body.initializer}
    common: set[str] = set()
    for node in body.node:
        fixed = (name in held | common or (name and known.chain(name) is not None) for name in node.input)
        if is_constant_op(node) and all(fixed):
            common.update(node.output)
    own = [*(i.name for i in body.input), *(name for n in body.node for name in n.output if name)]
    return [{name: name if name in common or run == 0 else _again(name, run) for name in own} for run in range(count)]


def _again(name: str, run: int) -> str:
    return f"{name}@{run + 1}"


def _renamed(node: onnx.NodeProto, names: Mapping[str, str], label: str) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = label
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    return copy


class _Border:
    """Makes the nodes around and between the runs of a body.

    Attributes:
        nodes: those of the runs too, in their order.
        marks: names of the nodes that it made.
    """

    def __init__(
        self, model: onnx.ModelProto, node: onnx.NodeProto, layout: _Layout, runs: Sequence[Mapping[str, str]]
    ) -> None:
        self._node, self._layout, self._runs = node, layout, runs
        self._body, self._opset = body_of(node, _BODY), opset_of(model)
        self._results = [o.name for o in self._body.output]
        self.nodes: list[onnx.NodeProto] = []
        self.marks: set[str] = set()
        constants = Constants(model, Path())
        outer = (*outer_reads(self._body), *filter(None, layout.inputs))
        for name in dict.fromkeys(name for name in outer if constants.chain(name) is None):
            self._add("Identity", [name])

    def enter(self, run: int) -> None:
        """What the body's inputs are at a run."""
        layout, names = self._layout, self._runs[run]
        own = [names[i.name] for i in self._body.input]
        first, back = layout.carried
        if first:  # of a Loop
            self._constant(np.array(run, np.int64), own[0])
            going = self._result(0, run - 1) if run else layout.inputs[1]
            if going:
                self._add("Identity", [going], own[1])
            else:
                self._constant(np.array(True), own[1])
        for i in range(layout.states):
            before = self._result(back + i, run - 1) if run else layout.inputs[first + i]
            self._add("Identity", [before], own[first + i])
        after = first + layout.states
        for name, whole, (axis, back_to_front) in zip(own[after:], layout.inputs[after:], layout.sliced, strict=True):
            index = len(self._runs) - 1 - run if back_to_front else run
            self._add("Gather", [whole, self._constant(np.array(index, np.int64))], name, axis=axis)

    def watch(self, run: int) -> None:
        """One more reader of everything that a run gives back."""
        for name in dict.fromkeys(self._result(i, run) for i in range(len(self._results))):
            self._add("Identity", [name])

    def leave(self) -> None:
        """What the node gives back."""
        layout, last, skipped = self._layout, len(self._runs) - 1, self._layout.carried[1]
        for i, y in enumerate(self._node.output):
            if not y:
                continue
            if i < layout.states:
                self._add("Identity", [self._result(skipped + i, last)], y, exit_name(y))
                continue
            axis, back_to_front = layout.stacked[i - layout.states]
            parts = [self._unsqueezed(self._result(skipped + i, run), axis) for run in range(last + 1)]
            self._add("Concat", parts[::-1] if back_to_front else parts, y, exit_name(y), axis=axis)

    def _result(self, i: int, run: int) -> str:
        return self._runs[run].get(self._results[i], self._results[i])

    def _unsqueezed(self, x: str, axis: int) -> str:
        if self._opset < _AXES_AS_INPUT:
            return self._add("Unsqueeze", [x], axes=[axis])
        return self._add("Unsqueeze", [x, self._constant(np.array([axis], np.int64))])

    def _constant(self, value: Any, y: str = "") -> str:
        return self._add("Constant", [], y, value=numpy_helper.from_array(value))

    def _add(self, op: str, inputs: Sequence[str], y: str = "", name: str = "", **attributes: Any) -> str:
        name = name or f"{BORDER}/{result(self._node)}/{len(self.marks)}"
        self.marks.add(name)
        self.nodes.append(helper.make_node(op, inputs, [y or name], name=name, **attributes))
        return y or name
