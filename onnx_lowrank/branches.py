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
class Opening:
    """A model with one branch after the other opened: `models` from the original on, `taken` between them."""

    models: tuple[onnx.ModelProto, ...]
    taken: tuple[Taken, ...] = ()

    @property
    def original(self) -> onnx.ModelProto:
        """With no branch opened."""
        return self.models[0]

    @property
    def flat(self) -> onnx.ModelProto:
        """With all of them opened."""
        return self.models[-1]

    def further(self, taken: Taken) -> Opening:
        """With one more branch opened; the same where that cannot be."""
        made = _opened(self.flat, taken)
        return self if made is None else Opening((*self.models, made), (*self.taken, taken))

    def of(self, model: onnx.ModelProto) -> Opening:
        """The same branches of another model, as far as it has them."""
        found = Opening((model,))
        for taken in self.taken:
            found = found.further(taken)
        return found

    def closed(self, flat: onnx.ModelProto) -> onnx.ModelProto:
        """The original with what a rewrite has changed in the opened model; `flat` itself where nothing is opened."""
        for before, opened, taken in reversed(list(zip(self.models, self.models[1:], self.taken, strict=False))):
            flat = _closed(before, opened, taken, flat)
        return flat

    def inside(self) -> dict[str, str]:
        """The If, by its first output, in whose opened branch a tensor was made; the innermost one."""
        branches = ((output, _branch(_at(model, output), then)) for model, (output, then) in self._steps())
        return {name: output for output, body in branches for node in body.node for name in node.output if name}

    def _steps(self) -> Iterator[tuple[onnx.ModelProto, Taken]]:
        return zip(self.models, self.taken, strict=False)

    def untaken(self) -> Iterator[onnx.NodeProto]:
        """Nodes of the branches that are never taken, those of bodies inside them too."""
        for model, (output, then) in self._steps():
            yield from _all_nodes(_branch(_at(model, output), not then))


def candidates(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The Ifs of the main graph with a linear operator in a branch."""
    ifs = (n for n in model.graph.node if n.op_type == "If" and n.domain in ("", "ai.onnx") and n.input and n.output)
    return [n for n in ifs if any(inner.op_type in _LINEAR for body in subgraphs(n) for inner in _all_nodes(body))]


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for body in subgraphs(node):
            yield from _all_nodes(body)


def _at(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(n for n in model.graph.node if n.op_type == "If" and output in n.output[:1])
    return found


def _branch(node: onnx.NodeProto, then: bool) -> onnx.GraphProto:
    wanted = "then_branch" if then else "else_branch"
    found: onnx.GraphProto = next(attribute.g for attribute in node.attribute if attribute.name == wanted)
    return found


def _opened(model: onnx.ModelProto, taken: Taken) -> onnx.ModelProto | None:
    """The model with a branch in the place of its If; None where names would clash or constants are all inputs."""
    position = next((i for i, n in enumerate(model.graph.node) if n.op_type == "If" and taken[0] in n.output[:1]), None)
    if position is None or model.ir_version < 4:
        return None
    node = model.graph.node[position]
    body, other = _branch(node, taken[1]), _branch(node, not taken[1])
    flat = onnx.ModelProto()
    flat.CopyFrom(model)
    del flat.graph.node[position]
    own = {name for n in body.node for name in n.output if name} | {t.name for t in body.initializer}
    if own & all_names(flat) or body.sparse_initializer or len(body.output) != len(node.output):
        return None
    inner = list(body.node)
    results = [o.name for o in body.output]
    exits = [
        helper.make_node("Identity", [made], [name], name=f"{_EXIT}/{name}")
        for made, name in zip(results, node.output, strict=True)
        if name
    ]
    watched = _watched(model, body, other, results)
    marks = [
        helper.make_node("Identity", [name], [f"{BORDER}/{taken[0]}/{i}"], name=f"{BORDER}/{taken[0]}/{i}")
        for i, name in enumerate(watched)
    ]
    nodes = [*flat.graph.node[:position], *inner, *marks, *exits, *flat.graph.node[position:]]
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del flat.graph.node[:]
    flat.graph.node.extend(kept)
    flat.graph.initializer.extend(body.initializer)
    return flat


def _watched(
    model: onnx.ModelProto, body: onnx.GraphProto, other: onnx.GraphProto, results: Iterable[str]
) -> list[str]:
    """Tensors that get a further reader."""
    constants = Constants(model, Path())
    captured = [name for name in outer_reads(body) if constants.chain(name) is None]
    return list(dict.fromkeys((*captured, *outer_reads(other), *results)))


def _closed(before: onnx.ModelProto, opened: onnx.ModelProto, taken: Taken, flat: onnx.ModelProto) -> onnx.ModelProto:
    """The model before an opening, with the nodes and constants of a rewritten opened one."""
    model = onnx.ModelProto()
    model.CopyFrom(flat)
    node = onnx.NodeProto()
    node.CopyFrom(_at(before, taken[0]))
    body = _branch(node, taken[1])
    inside, outside = _sides(body, opened, flat, node)
    known = {t.name for t in opened.graph.initializer}
    own = {t.name for t in body.initializer}
    body_reads = reads(onnx.GraphProto(), inside)
    elsewhere = reads(flat.graph, outside)
    new = {t.name for t in flat.graph.initializer if t.name not in known}
    mine = own | {name for name in new if body_reads[name] and not elsewhere[name]}
    constants = [t for t in flat.graph.initializer if t.name in mine]
    _replace(body.node, inside)
    _replace(body.initializer, constants)
    made = {name for n in inside for name in n.output} | mine
    _replace(body.value_info, [v for v in body.value_info if v.name in made])
    _replace(body.quantization_annotation, [a for a in body.quantization_annotation if a.tensor_name in made])
    _replace(model.graph.node, [node if _is_exit(n, node) else n for n in outside])
    _replace(model.graph.initializer, [t for t in flat.graph.initializer if t.name not in mine])
    return model


def _sides(
    body: onnx.GraphProto, opened: onnx.ModelProto, flat: onnx.ModelProto, node: onnx.NodeProto
) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """Nodes of the branch, and of the graph around it, where the first exit stands for the If.

    New nodes stand before the one that makes the tensor that the old ones made, and go where that was made.
    """
    inner = {name for n in body.node for name in n.output if name}
    known = {name for n in opened.graph.node for name in n.output if name}
    first = next(name for name in node.output if name)
    borders = {f"{_EXIT}/{name}" for name in node.output} - {f"{_EXIT}/{first}"}
    borders |= {n.name for n in opened.graph.node if n.name.startswith(f"{BORDER}/{node.output[0]}/")}
    inside: list[onnx.NodeProto] = []
    outside: list[onnx.NodeProto] = []
    waiting: list[onnx.NodeProto] = []
    for one in flat.graph.node:
        waiting.append(one)
        if not known.intersection(one.output):
            continue
        side = inside if inner.intersection(one.output) else outside
        side += [n for n in waiting if n.name not in borders]
        waiting = []
    return inside, outside


def _is_exit(one: onnx.NodeProto, node: onnx.NodeProto) -> bool:
    return one.name.startswith(_EXIT) and one.output[0] in node.output


def _replace(field: object, values: Sequence[object]) -> None:
    """Put copies of messages in the place of all of a repeated field."""
    copies = [type(value).FromString(value.SerializeToString()) for value in values]  # type: ignore[attr-defined]
    del field[:]  # type: ignore[attr-defined]
    field.extend(copies)  # type: ignore[attr-defined]
