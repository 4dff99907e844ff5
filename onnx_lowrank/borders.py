"""What opened bodies of control flow have in common: the border around them, and how they are closed again.

Nodes of an opened body stand in the main graph, once for every run of it. Nothing may reach over a border, so that no
fold, layer or metric takes one side for all there is, and no run differs from another: whatever crosses it goes through
a node that no constant is followed through, and is read once more by one that nothing reads in its turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
from onnx import helper

from onnx_lowrank.errors import PassError
from onnx_lowrank.protos import BORDER, reads, subgraphs

Taken = tuple[str, int]
"""First output of an If, Loop or Scan, and how often its body runs; of an If, whether its `then_branch` is taken."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One body that was opened.

    Attributes:
        node: the If, Loop or Scan, with its bodies.
        taken: see `Taken`.
        attribute: name of the attribute that holds the body.
        made: all tensors that nodes of the opened model make.
        constants: all its initializers.
        borders: names of the nodes that mark the border, but for the first exit, which stands for the node.
        runs: for every run of the body, what its own tensors are called in the opened model.
        again: names of the nodes of all runs but the first.
    """

    node: onnx.NodeProto
    taken: int
    attribute: str
    made: frozenset[str]
    constants: frozenset[str]
    borders: frozenset[str]
    runs: tuple[Mapping[str, str], ...]
    again: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        flat: onnx.ModelProto,
        node: onnx.NodeProto,
        taken: int,
        attribute: str,
        borders: Iterable[str],
        runs: Sequence[Mapping[str, str]],
        again: Iterable[str] = (),
    ) -> Step:
        """What an opened model tells of itself."""
        made = frozenset(name for n in flat.graph.node for name in n.output if name)
        constants = frozenset(t.name for t in flat.graph.initializer)
        return cls(node, taken, attribute, made, constants, frozenset(borders), tuple(runs), frozenset(again))

    @property
    def inside(self) -> Iterator[str]:
        """The tensors of all runs."""
        return (name for names in self.runs for name in names.values())


def result(node: onnx.NodeProto) -> str:
    """The first output of a node that has a name."""
    return next(str(name) for name in node.output if name)


def body_of(node: onnx.NodeProto, attribute: str) -> onnx.GraphProto:
    """A body by the name of its attribute, to be read or changed in place."""
    found: onnx.GraphProto = next(one.g for one in node.attribute if one.name == attribute)
    return found


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of a graph and of the bodies inside it."""
    for node in graph.node:
        yield node
        for body in subgraphs(node):
            yield from all_nodes(body)


def identity(name: str, x: str, y: str) -> onnx.NodeProto:
    """A border node; one whose output has its own name is a further reader."""
    return helper.make_node("Identity", [x], [y], name=name)


def exit_name(y: str) -> str:
    """Name of the border node that makes an output; that of the first one stands for the node that was opened."""
    return f"{BORDER}_exit/{y}"


def closed(step: Step, flat: onnx.ModelProto) -> onnx.ModelProto:
    """The model before an opening, with the nodes and constants of a rewritten opened one.

    Raises:
        PassError: the runs of a body were not rewritten in the same way.
    """
    model, node = onnx.ModelProto(), onnx.NodeProto()
    model.CopyFrom(flat)
    node.CopyFrom(step.node)
    body, first = body_of(node, step.attribute), exit_name(result(node))
    outside, inside, *others = _sides(step, flat)
    _check_alike(step, [inside, *others])
    read, elsewhere = reads(onnx.GraphProto(), inside), reads(flat.graph, outside)
    mine = {t.name for t in body.initializer}
    new = {t.name for t in flat.graph.initializer} - step.constants
    mine |= {name for name in new if read[name] and not elsewhere[name]}
    refill(body.node, inside)
    refill(body.initializer, [t for t in flat.graph.initializer if t.name in mine])
    made = {name for n in inside for name in n.output} | mine | {i.name for i in body.input}
    refill(body.value_info, [v for v in body.value_info if v.name in made])
    refill(body.quantization_annotation, [a for a in body.quantization_annotation if a.tensor_name in made])
    refill(model.graph.node, [node if n.name == first else n for n in outside])
    for index in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[index].name in mine:
            del model.graph.initializer[index]
    return model


def _sides(step: Step, flat: onnx.ModelProto) -> list[list[onnx.NodeProto]]:
    """Nodes of the graph around a body, where the first exit stands for its node, and of every run of the body.

    New nodes stand before the one that makes the tensor that the old ones made, and go where that was made. A node that
    all runs share belongs to the first.
    """
    side = {name: at for at, names in reversed(list(enumerate(step.runs, 1))) for name in names.values()}
    found: list[list[onnx.NodeProto]] = [[] for _ in range(len(step.runs) + 1)]
    waiting: list[onnx.NodeProto] = []
    for one in flat.graph.node:
        waiting.append(one)
        if step.made.isdisjoint(one.output):
            continue
        at = next((side[name] for name in one.output if name in side), 0)
        found[at] += [n for n in waiting if n.name not in step.borders]
        waiting = []
    return found


def _check_alike(step: Step, runs: Sequence[Sequence[onnx.NodeProto]]) -> None:
    """Refuse runs that differ in more than names."""
    if len(runs) == 1:
        return
    common = {name for name, again in step.runs[1].items() if name == again}
    mine = [node for node in runs[0] if common.isdisjoint(node.output)]
    first = _form(mine, step.runs[0])
    if any(_form(nodes, names) != first for nodes, names in zip(runs[1:], step.runs[1:], strict=True)):
        raise PassError(f"the runs of the body of {step.node.op_type} '{result(step.node)}' became different ones")


def _form(nodes: Sequence[onnx.NodeProto], names: Mapping[str, str]) -> list[Any]:
    """What nodes of a run do, with its tensors called as in the body, and new ones by their place."""
    known = {"": "", **{here: name for name, here in names.items()}}
    found: list[Any] = []
    for node in nodes:
        for name in node.output:
            known.setdefault(name, f"{BORDER}/{len(known)}")
        tensors = [[known.get(name, name) for name in side] for side in (node.input, node.output)]
        attributes = [a.SerializeToString(deterministic=True) for a in node.attribute]
        found.append((node.domain, node.op_type, tensors, attributes))
    return found


def refill(field: Any, values: Sequence[Any]) -> None:
    """Put copies of messages in the place of all of a repeated field."""
    copies = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(copies)
