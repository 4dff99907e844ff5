"""A branch of an If that is always taken, opened into the main graph; and closed again.

    before   z = If (c) < then: t = Op(x, w);  o = Relu(t), else: … >
    opened   t = Op(x, w);  o = Relu(t);  z = Identity(o);       what both branches read, and o, is read once more

While a model is planned, everything works on the opened one. `closed` puts the nodes back into their branch, those too
that a rewrite has put in the place of others; the other branch stays as it is. Nothing may reach over the border: every
computed tensor that a branch reads, every result, and every constant that the other branch reads, has a further reader
that nothing reads in its turn, so that no fold, layer or metric takes the others for all there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from onnx_lowrank.constants import Constants
from onnx_lowrank.protos import all_names, outer_reads, reads, subgraphs

BORDER = "onnx_lowrank_border"
"""Start of the names of the nodes and tensors that mark a border."""

_EXIT = f"{BORDER}_exit"

Taken = tuple[str, bool]
"""First output of an If, and whether its `then_branch` is always taken."""

_LINEAR = ("Conv", "ConvTranspose", "MatMul", "Gemm", "FusedMatMul", "FusedConv", "FusedGemm")


@dataclasses.dataclass(frozen=True)
class _Step:
    """One branch that was opened.

    Attributes:
        node: the If, with its bodies.
        taken: whether that is its `then_branch`.
        made: all tensors that nodes of the opened model make.
        constants: all its initializers.
        borders: names of the nodes that mark the border, but for the first exit, which stands for the If.
    """

    node: onnx.NodeProto
    taken: bool
    made: frozenset[str]
    constants: frozenset[str]
    borders: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Opening:
    """A model, the same with branches opened one after the other, and how."""

    original: onnx.ModelProto
    flat: onnx.ModelProto
    steps: tuple[_Step, ...] = ()

    @classmethod
    def none(cls, model: onnx.ModelProto) -> Opening:
        """A model with no branch opened."""
        return cls(model, model)

    @property
    def taken(self) -> tuple[Taken, ...]:
        """The branches that were opened."""
        return tuple((result(step.node), step.taken) for step in self.steps)

    def further(self, taken: Taken) -> Opening:
        """With one more branch opened; the same where that cannot be."""
        made = _opened(self.flat, taken)
        return self if made is None else Opening(self.original, made[0], (*self.steps, made[1]))

    def of(self, model: onnx.ModelProto) -> Opening:
        """The same branches of another model, as far as it has them."""
        found = Opening.none(model)
        for taken in self.taken:
            found = found.further(taken)
        return found

    def closed(self, flat: onnx.ModelProto) -> onnx.ModelProto:
        """The original with what a rewrite has changed in the opened model; `flat` itself where nothing is opened."""
        for step in reversed(self.steps):
            flat = _closed(step, flat)
        return flat

    def inside(self) -> dict[str, str]:
        """The If, by its first output, in whose opened branch a tensor was made; the innermost one."""
        branches = ((result(step.node), _branch(step.node, then=step.taken)) for step in self.steps)
        return {name: output for output, body in branches for node in body.node for name in node.output if name}

    def untaken(self) -> Iterator[onnx.NodeProto]:
        """Nodes of the branches that are never taken, those of bodies inside them too."""
        for step in self.steps:
            yield from _all_nodes(_branch(step.node, then=not step.taken))


def candidates(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The Ifs of the main graph with a linear operator in a branch."""
    ifs = (
        n for n in model.graph.node if n.op_type == "If" and n.domain in ("", "ai.onnx") and n.input and any(n.output)
    )
    return [n for n in ifs if any(inner.op_type in _LINEAR for body in subgraphs(n) for inner in _all_nodes(body))]


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for body in subgraphs(node):
            yield from _all_nodes(body)


def result(node: onnx.NodeProto) -> str:
    """The first output of a node that has a name."""
    return next(str(name) for name in node.output if name)


def _branch(node: onnx.NodeProto, *, then: bool) -> onnx.GraphProto:
    wanted = "then_branch" if then else "else_branch"
    found: onnx.GraphProto = next(attribute.g for attribute in node.attribute if attribute.name == wanted)
    return found


def _opened(model: onnx.ModelProto, taken: Taken) -> tuple[onnx.ModelProto, _Step] | None:
    """The model with a branch in the place of its If; None where names would clash or constants are all inputs."""
    nodes = list(model.graph.node)
    position = next((i for i, n in enumerate(nodes) if n.op_type == "If" and taken[0] in n.output), None)
    if position is None or model.ir_version < 4:
        return None
    node = onnx.NodeProto()
    node.CopyFrom(nodes[position])
    body, other = (_branch(node, then=then) for then in (taken[1], not taken[1]))
    flat = onnx.ModelProto()
    flat.CopyFrom(model)
    del flat.graph.node[position]
    own = {name for n in body.node for name in n.output if name} | {t.name for t in body.initializer}
    clash = own & (all_names(flat) | set(node.output))
    if clash or body.sparse_initializer or len(body.output) != len(node.output):
        return None
    results = [o.name for o in body.output]
    pairs = [(made, name) for made, name in zip(results, node.output, strict=True) if name]
    exits = [_border(f"{_EXIT}/{name}", made, name) for made, name in pairs]
    names = {f"{BORDER}/{result(node)}/{i}": name for i, name in enumerate(_watched(model, body, other, results))}
    marks = [_border(mark, name, mark) for mark, name in names.items()]
    _replace(flat.graph.node, [*nodes[:position], *body.node, *marks, *exits, *nodes[position + 1 :]])
    flat.graph.initializer.extend(body.initializer)
    made = frozenset(name for n in flat.graph.node for name in n.output if name)
    borders = frozenset((*names, *(n.name for n in exits[1:])))
    return flat, _Step(node, taken[1], made, frozenset(t.name for t in flat.graph.initializer), borders)


def _border(name: str, x: str, y: str) -> onnx.NodeProto:
    return helper.make_node("Identity", [x], [y], name=name)


def _watched(
    model: onnx.ModelProto, body: onnx.GraphProto, other: onnx.GraphProto, results: Iterable[str]
) -> list[str]:
    """Tensors that get a further reader."""
    constants = Constants(model, Path())
    captured = [name for name in outer_reads(body) if constants.chain(name) is None]
    return list(dict.fromkeys((*captured, *outer_reads(other), *results)))


def _closed(step: _Step, flat: onnx.ModelProto) -> onnx.ModelProto:
    """The model before an opening, with the nodes and constants of a rewritten opened one."""
    model, node = onnx.ModelProto(), onnx.NodeProto()
    model.CopyFrom(flat)
    node.CopyFrom(step.node)
    body, first = _branch(node, then=step.taken), f"{_EXIT}/{result(node)}"
    inside, outside = _sides(step, flat)
    read, elsewhere = reads(onnx.GraphProto(), inside), reads(flat.graph, outside)
    mine = {t.name for t in body.initializer}
    new = {t.name for t in flat.graph.initializer} - step.constants
    mine |= {name for name in new if read[name] and not elsewhere[name]}
    _replace(body.node, inside)
    _replace(body.initializer, [t for t in flat.graph.initializer if t.name in mine])
    made = {name for n in inside for name in n.output} | mine
    _replace(body.value_info, [v for v in body.value_info if v.name in made])
    _replace(body.quantization_annotation, [a for a in body.quantization_annotation if a.tensor_name in made])
    _replace(model.graph.node, [node if n.name == first else n for n in outside])
    for index in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[index].name in mine:
            del model.graph.initializer[index]
    return model


def _sides(step: _Step, flat: onnx.ModelProto) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """Nodes of the branch, and of the graph around it, where the first exit stands for the If.

    New nodes stand before the one that makes the tensor that the old ones made, and go where that was made.
    """
    inner = {name for n in _branch(step.node, then=step.taken).node for name in n.output if name}
    inside: list[onnx.NodeProto] = []
    outside: list[onnx.NodeProto] = []
    waiting: list[onnx.NodeProto] = []
    for one in flat.graph.node:
        waiting.append(one)
        if step.made.isdisjoint(one.output):
            continue
        side = outside if inner.isdisjoint(one.output) else inside
        side += [n for n in waiting if n.name not in step.borders]
        waiting = []
    return inside, outside


def _replace(field: Any, values: Sequence[Any]) -> None:
    """Put copies of messages in the place of all of a repeated field."""
    copies = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(copies)
