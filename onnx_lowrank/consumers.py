"""Who reads a site's output: other sites, through operators that treat every element or every channel alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx

from onnx_lowrank.graph import Graph
from onnx_lowrank.sites import Site

ELEMENTWISE = frozenset(
    [
        *("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Gelu", "FastGelu", "QuickGelu", "ThresholdedRelu", "Mish"),
        *("Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Softplus", "Softsign", "Erf", "Exp", "Sqrt", "Pow"),
        *("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Clip", "Identity", "Dropout"),
    ]
)
"""Operators that treat every element alone, where the other operands are constants."""

_CHANNELWISE = frozenset(("MaxPool", "AveragePool"))

LONGEST = 48
"""Nodes between two sites: a residual stream goes on to the end of the model, and would be followed from every site."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """A site that reads the output of another one.

    `image` is the tensor between them that is one scalar function of that output, element by element; the output
    itself where nothing lies between.
    """

    site: Site
    image: str


def readers(graph: Graph, site: Site, sites: Mapping[int, Site]) -> tuple[Reader, ...]:
    """The sites that alone read a site's output; none when anything else does, or mixes its channels.

    Args:
        sites: by the position of the node that reads.
    """
    image, waiting, between, found = {site.y: site.y}, [site.y], [], []
    while waiting:
        tensor = waiting.pop()
        positions = graph.readers(tensor)
        if tensor in graph.outputs or not positions:
            return ()
        for position in dict.fromkeys(positions):
            consumer, node = sites.get(position), graph.protos[position]
            if consumer is not None:
                if consumer.x != tensor or not aligned(site, consumer):
                    return ()
                found.append(Reader(consumer, image[tensor]))
                continue
            reached = _image(node, tensor, image[tensor], site)
            if reached is None:
                return ()
            between.append(node)
            if len(between) > LONGEST:
                return ()
            if node.output[0] not in image:
                image[node.output[0]] = reached
                waiting.append(node.output[0])
    return tuple(found) if all(_alone(graph, node, image) for node in between) else ()


def _image(node: onnx.NodeProto, tensor: str, image: str, site: Site) -> str | None:
    """The elementwise image after a node; None when the node does more than that."""
    if sum(bool(output) for output in node.output) != 1:
        return None
    if node.op_type in ELEMENTWISE and image == tensor:
        return str(node.output[0])
    return image if node.op_type in _CHANNELWISE and site.geometry.op == "Conv" else None


def _alone(graph: Graph, node: onnx.NodeProto, image: Mapping[str, str]) -> bool:
    """Whether every other operand of a node is a scalar constant or itself a function of the output."""
    operands = [name for name in node.input if name and name not in image]
    values = [graph.constants.fixed(name) for name in operands]
    return all(value is not None and value.size == 1 for value in values)


def aligned(site: Site, consumer: Site) -> bool:
    """Whether the output's channels are the channels that the consumer sums over."""
    mine, theirs = site.geometry, consumer.geometry
    if max(mine.groups, theirs.groups) > 1 or "ConvTranspose" in (mine.op, theirs.op):
        return False
    if mine.op == "Conv" or theirs.op == "Conv":
        return mine.op == theirs.op and theirs.channels == mine.outputs
    plain = not theirs.trans_a and mine.side == theirs.side == "right"
    return plain and theirs.inputs == mine.outputs
