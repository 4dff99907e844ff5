"""Attention as exporters write it: sites for queries, keys and values, and the site that reads the heads' outputs.

query site -[ Reshape, Transpose, · scalar ]- Q ┐
key site   -[ Reshape, Transpose, · scalar ]- K ┴[ MatMul ]-[ elementwise ]-[ Softmax ]- P ┐
value site -[ Reshape, Transpose           ]- V ───────────────────────────────────────────┴[ MatMul ]-[ Transpose,
Reshape ]- site
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from onnx_lowrank.graph import Graph
from onnx_lowrank.sites import Site

_MOVES = frozenset(("Reshape", "Transpose", "Identity"))
_SCORES = frozenset(("Mul", "Div", "Add", "Sub", "Where", "Identity"))
_DEPTH = 8


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention: tensors, and the sites behind them; None where no site alone stands behind a tensor.

    Attributes:
        queries, values: names, B×H×T×d.
        keys: name, B×H×d×T.
        weights: name, B×H×T×T: the softmax.
        reader: the site that reads what the heads give, side by side.
    """

    queries: str
    keys: str
    values: str
    weights: str
    query: Site | None
    key: Site | None
    value: Site | None
    reader: Site | None

    @property
    def tensors(self) -> tuple[str, ...]:
        """All that has to be seen of a run."""
        sites = (site for site in (self.query, self.key, self.value) if site is not None)
        return (self.queries, self.keys, self.values, self.weights, *(site.y for site in sites))


def attentions(graph: Graph, sites: Sequence[Site]) -> tuple[Attention, ...]:
    """The attentions of a graph with a site among their queries, keys or values."""
    found = [_attention(graph, position, sites) for position in range(len(graph.protos))]
    return tuple(one for one in found if one is not None and (one.query or one.key or one.value))


def _attention(graph: Graph, position: int, sites: Sequence[Site]) -> Attention | None:
    softmax = graph.protos[position]
    if softmax.op_type != "Softmax":
        return None
    weights, scores = softmax.output[0], _scores(graph, softmax.input[0])
    mix = _only(graph, weights)
    if scores is None or mix is None or graph.protos[mix].op_type != "MatMul" or graph.protos[mix].input[0] != weights:
        return None
    product, values = graph.protos[scores], graph.protos[mix].input[1]
    written, reading = {site.y: site for site in sites}, {site.nodes[0]: site for site in sites}
    query, key, value = (_source(graph, name, written) for name in (product.input[0], product.input[1], values))
    reader = _reader(graph, graph.protos[mix].output[0], reading)
    if reader is None:
        value = None
    return Attention(product.input[0], product.input[1], values, weights, query, key, value, reader)


def _only(graph: Graph, tensor: str) -> int | None:
    """The one node that reads values of a tensor; nodes that ask for its shape do not count."""
    readers = [p for p in dict.fromkeys(graph.readers(tensor)) if graph.protos[p].op_type != "Shape"]
    return readers[0] if len(readers) == 1 and tensor not in graph.outputs else None


def _scores(graph: Graph, tensor: str) -> int | None:
    """The MatMul of two computed tensors whose product, scaled and masked, a softmax gets."""
    waiting = [(tensor, 0)]
    while waiting:
        name, depth = waiting.pop()
        position = graph.producer(name)
        if position is None or depth > _DEPTH:
            continue
        node = graph.protos[position]
        if node.op_type == "MatMul" and all(graph.constants.chain(operand) is None for operand in node.input):
            return position
        if node.op_type in _SCORES:
            waiting += [(operand, depth + 1) for operand in node.input]
    return None


def _source(graph: Graph, tensor: str, written: Mapping[str, Site]) -> Site | None:
    """The site whose output, only moved and scaled, is that tensor, and which nothing else reads."""
    for _ in range(_DEPTH):
        if _only(graph, tensor) is None:
            return None
        if tensor in written:
            return written[tensor]
        position = graph.producer(tensor)
        if position is None:
            return None
        node = graph.protos[position]
        if node.op_type in _MOVES:
            tensor = node.input[0]
        elif node.op_type in ("Mul", "Div") and (moved := _scaled(graph, tuple(node.input))) is not None:
            tensor = moved
        else:
            return None
    return None


def _scaled(graph: Graph, operands: tuple[str, ...]) -> str | None:
    """The operand that is multiplied by a scalar constant."""
    fixed = [graph.constants.fixed(name) for name in operands]
    scalar = [value is not None and value.size == 1 for value in fixed]
    return operands[scalar.index(False)] if sum(scalar) == 1 else None


def _reader(graph: Graph, tensor: str, reading: Mapping[int, Site]) -> Site | None:
    """The site that alone reads a tensor, only moved."""
    for _ in range(_DEPTH):
        position = _only(graph, tensor)
        if position is None:
            return None
        if position in reading:
            site = reading[position]
            plain = site.geometry.side == "right" and not site.geometry.trans_a and site.geometry.groups == 1
            return site if site.x == tensor and plain else None
        node = graph.protos[position]
        if node.op_type not in _MOVES or node.input[0] != tensor:
            return None
        tensor = node.output[0]
    return None
