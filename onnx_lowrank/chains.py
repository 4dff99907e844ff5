"""Pairs of sites with nothing but channelwise operators between them: a hidden layer that can be made narrower."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lowrank.consumers import ELEMENTWISE, LONGEST, aligned
from onnx_lowrank.fragment import Op
from onnx_lowrank.graph import Graph
from onnx_lowrank.linalg import Index
from onnx_lowrank.protos import attribute
from onnx_lowrank.sites import Site


class Broken(enum.Enum):
    """Why the output of a site is no hidden layer that can be made narrower."""

    VISIBLE = "its channels leave the graph"
    UNREAD = "nothing reads its channels"
    SEVERAL = "more than one site reads its channels"
    MIXED = "an operator on the way reads more than one channel at a time, or reads channels in a subgraph"
    OPERAND = "a tensor that is not a constant for each channel enters on the way"
    LONG = "more nodes lie on the way than are followed"
    LAYOUT = "the site that reads its channels sums over another axis"


@dataclasses.dataclass(frozen=True)
class Constant:
    """A constant on the way, and the axis that holds the channels; None where it is a scalar."""

    value: npt.NDArray[Any]
    axis: int | None

    def of(self, channels: Index) -> npt.NDArray[Any]:
        """The constant of some channels."""
        return self.value if self.axis is None else np.take(self.value, channels, self.axis)


@dataclasses.dataclass(frozen=True)
class Chain:
    """What lies between a producer's output `start` and the input `end` of the site that alone reads it.

    `ops` are in topological order, with the graph's own names of tensors; `nodes` are their positions.
    """

    producer: Site
    consumer: Site
    nodes: tuple[int, ...]
    ops: tuple[Op, ...]
    constants: Mapping[str, Constant] = dataclasses.field(repr=False, compare=False)

    @property
    def start(self) -> str:
        """The tensor that the producer writes."""
        return self.producer.y

    @property
    def end(self) -> str:
        """The tensor that the consumer reads."""
        return self.consumer.x


def disjoint_chains(graph: Graph, sites: Sequence[Site]) -> tuple[Chain, ...]:
    """The chains among some sites, no site in two of them: the ones with the largest weights.

    Sites with twins are in none: their weight is read elsewhere too.
    """
    at = {site.nodes[0]: site for site in sites if not site.twins}
    chains = [chain for chain in (chain_after(graph, site, at) for site in at.values()) if isinstance(chain, Chain)]
    taken: set[str] = set()
    found = []
    for chain in sorted(chains, key=lambda c: -(c.producer.weight.size + c.consumer.weight.size)):
        names = {chain.producer.name, chain.consumer.name}
        if not names & taken:
            taken |= names
            found.append(chain)
    return tuple(found)


def chain_after(graph: Graph, producer: Site, sites: Mapping[int, Site]) -> Chain | Broken:
    """The chain that starts at a site's output, or why there is none.

    Args:
        sites: by the position of the node that reads.
    """
    between: dict[int, None] = {}
    inside, waiting, consumers = {producer.y}, [producer.y], {}
    while waiting:
        tensor = waiting.pop()
        readers = dict.fromkeys(graph.readers(tensor))
        if tensor in graph.outputs or not readers:
            return Broken.VISIBLE if tensor in graph.outputs else Broken.UNREAD
        for position in readers:
            if position in sites:
                consumers[position, tensor] = sites[position]
            elif not _channelwise(graph, graph.protos[position], producer):
                return Broken.MIXED
            elif len(between) >= LONGEST:
                return Broken.LONG
            elif position not in between:
                between[position] = None
                inside.add(graph.protos[position].output[0])
                waiting.append(graph.protos[position].output[0])
    if len(consumers) != 1:
        return Broken.SEVERAL
    ((_, tensor), consumer), *_ = consumers.items()
    if consumer.x != tensor or not aligned(producer, consumer):
        return Broken.LAYOUT
    constants = _constants(graph, between, inside, producer)
    if constants is None:
        return Broken.OPERAND
    nodes = _sorted(graph, between, producer.y)
    return Chain(producer, consumer, nodes, tuple(_op(graph, position) for position in nodes), constants)


def _channelwise(graph: Graph, node: onnx.NodeProto, producer: Site) -> bool:
    if node.domain not in ("", "ai.onnx") or sum(bool(name) for name in node.output) != 1 or "" in node.input:
        return False
    if node.op_type in ELEMENTWISE or node.op_type == "PRelu":
        return True
    if producer.geometry.op != "Conv":
        return False
    if node.op_type == "BatchNormalization":
        return not attribute(node, "training_mode", 0)
    if node.op_type == "Conv":
        weight = graph.constants.fixed(node.input[1])
        width = producer.geometry.outputs
        return weight is not None and attribute(node, "group", 1) == width == len(weight) and weight.shape[1] == 1
    return node.op_type in ("MaxPool", "AveragePool")


def _constants(graph: Graph, positions: Iterable[int], inside: set[str], producer: Site) -> dict[str, Constant] | None:
    """Constants by name; None when an operand is none, or does not go by channels."""
    found = {}
    for node in (graph.protos[position] for position in positions):
        for name in node.input:
            if name not in inside:
                value = graph.constants.fixed(name)
                constant = None if value is None else _by_channel(node, value, producer)
                if constant is None:
                    return None
                found[name] = constant
    return found


def _by_channel(node: onnx.NodeProto, value: npt.NDArray[Any], producer: Site) -> Constant | None:
    width = producer.geometry.outputs
    if node.op_type in ("BatchNormalization", "Conv"):
        return Constant(value, 0) if value.ndim and len(value) == width else None
    if value.size == 1:
        return Constant(value, None)
    axis = value.ndim - 1 - len(producer.geometry.kernel)
    return Constant(value, axis) if axis >= 0 and value.size == value.shape[axis] == width else None


def _sorted(graph: Graph, positions: Iterable[int], start: str) -> tuple[int, ...]:
    """Positions so that every node comes after those that it reads; files need not be sorted."""
    waiting = sorted(positions)
    made = {graph.protos[position].output[0] for position in waiting}
    known, found = {start}, []
    while waiting:
        ready = next(p for p in waiting if all(name in known or name not in made for name in graph.protos[p].input))
        waiting.remove(ready)
        known.add(graph.protos[ready].output[0])
        found.append(ready)
    return tuple(found)


def _op(graph: Graph, position: int) -> Op:
    node = graph.protos[position]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    given = {name: value for name, value in attributes.items() if not isinstance(value, list) or value}
    return Op("narrow", node.op_type, tuple(node.input), node.output[0], given, graph.names[position])
