"""Bodies of control flow opened into the main graph, and closed again: branches that are always taken; and loops.

    before   z = If (c) < then: t = Op(x, w);  o = Relu(t), else: … >
    opened   t = Op(x, w);  o = Relu(t);  z = Identity(o);       what both branches read, and o, is read once more

While a model is planned, everything works on the opened one. `closed` puts the nodes back into their branch, those too
that a rewrite has put in the place of others; the other branch stays as it is, and what it reads counts as read
elsewhere (`borders`). Loop and Scan are in `loops`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from onnx_lowrank import borders
from onnx_lowrank.borders import Step, Taken, all_nodes, body_of, exit_name, identity, refill, result
from onnx_lowrank.constants import Constants
from onnx_lowrank.loops import LOOPS, unrolled
from onnx_lowrank.protos import BORDER, all_names, outer_reads, subgraphs

_LINEAR = ("Conv", "ConvTranspose", "MatMul", "Gemm", "FusedMatMul", "FusedConv", "FusedGemm")
_BRANCHES = ("else_branch", "then_branch")


@dataclasses.dataclass(frozen=True)
class Opening:
    """A model, the same with bodies opened one after the other, and how."""

    original: onnx.ModelProto
    flat: onnx.ModelProto
    steps: tuple[Step, ...] = ()

    @classmethod
    def none(cls, model: onnx.ModelProto) -> Opening:
        """A model with no body opened."""
        return cls(model, model)

    @property
    def taken(self) -> tuple[Taken, ...]:
        """The bodies that were opened."""
        return tuple((result(step.node), step.taken) for step in self.steps)

    def further(self, taken: Taken) -> Opening:
        """With one more body opened; the same where that cannot be."""
        position = next((i for i, n in enumerate(self.flat.graph.node) if _opens(n) and taken[0] in n.output), None)
        if position is None or self.flat.ir_version < 4:
            return self
        if self.flat.graph.node[position].op_type == "If":
            made = _opened(self.flat, position, then=bool(taken[1]))
        else:
            made = unrolled(self.flat, position, taken[1])
        return self if made is None else Opening(self.original, made[0], (*self.steps, made[1]))

    def of(self, model: onnx.ModelProto) -> Opening:
        """The same bodies of another model, as far as it has them."""
        found = Opening.none(model)
        for taken in self.taken:
            found = found.further(taken)
        return found

    def closed(self, flat: onnx.ModelProto) -> onnx.ModelProto:
        """The original with what a rewrite has changed in the opened model; `flat` itself where nothing is opened.

        Raises:
            PassError: the runs of a loop's body were not rewritten in the same way.
        """
        for step in reversed(self.steps):
            flat = borders.closed(step, flat)
        return flat

    def inside(self) -> dict[str, str]:
        """The If, Loop or Scan, by its first output, in whose opened body a tensor was made; the innermost one."""
        return {name: result(step.node) for step in self.steps for name in step.inside}

    def again(self, node: str) -> bool:
        """Whether a node, by its name, stands for one of a loop's body at a later run than the first."""
        return any(not step.again.isdisjoint((node, node.rpartition("/")[0])) for step in self.steps)

    def untaken(self) -> Iterator[onnx.NodeProto]:
        """Nodes of the branches that are never taken, those of bodies inside them too."""
        for step in self.steps:
            if step.node.op_type == "If":
                yield from all_nodes(body_of(step.node, _BRANCHES[not step.taken]))


def candidates(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The Ifs, Loops and Scans of the main graph with a linear operator in a body."""
    found = (n for n in model.graph.node if _opens(n) and n.input and any(n.output))
    return [n for n in found if any(inner.op_type in _LINEAR for body in subgraphs(n) for inner in all_nodes(body))]


def _opens(node: onnx.NodeProto) -> bool:
    return node.op_type in ("If", *LOOPS) and node.domain in ("", "ai.onnx")


def _opened(model: onnx.ModelProto, position: int, *, then: bool) -> tuple[onnx.ModelProto, Step] | None:
    """The model with a branch in the place of its If; None where names would clash."""
    nodes, node = list(model.graph.node), onnx.NodeProto()
    node.CopyFrom(nodes[position])
    body, other = (body_of(node, _BRANCHES[which]) for which in (then, not then))
    flat = onnx.ModelProto()
    flat.CopyFrom(model)
    del flat.graph.node[position]
    own = {name for n in body.node for name in n.output if name}
    clash = (own | {t.name for t in body.initializer}) & (all_names(flat) | set(node.output))
    if clash or body.sparse_initializer or body.quantization_annotation or len(body.output) != len(node.output):
        return None
    results = [o.name for o in body.output]
    pairs = [(made, name) for made, name in zip(results, node.output, strict=True) if name]
    exits = [identity(exit_name(name), made, name) for made, name in pairs]
    names = {f"{BORDER}/{result(node)}/{i}": name for i, name in enumerate(_watched(model, body, other, results))}
    marks = [identity(mark, name, mark) for mark, name in names.items()]
    refill(flat.graph.node, [*nodes[:position], *body.node, *marks, *exits, *nodes[position + 1 :]])
    flat.graph.initializer.extend(body.initializer)
    marked = (*names, *(n.name for n in exits[1:]))
    return flat, Step.of(flat, node, int(then), _BRANCHES[then], marked, [{name: name for name in own}])


def _watched(
    model: onnx.ModelProto, body: onnx.GraphProto, other: onnx.GraphProto, results: Iterable[str]
) -> list[str]:
    """Tensors that get a further reader."""
    constants = Constants(model, Path())
    captured = [name for name in outer_reads(body) if constants.chain(name) is None]
    return list(dict.fromkeys((*captured, *outer_reads(other), *results)))
