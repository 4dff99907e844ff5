"""Take sites that read one weight together: one site with twins, one decision, one set of factors.

    before   x -[ W, b ]-> y        u -[ W, b ]-> v
    site     x -[ W, b ]-> y        twin: u -[ W, b ]-> v

What follows a node (its bias Add, its BatchNormalization) is folded in where that leaves all of them one map; else
none of it is. All stay dense (`Why.SHARED`) where the maps still differ (a transposed reader, another stride or bias),
or where anything else keeps the weight alive: a Gather, a graph output, a constant node that nothing reads. A body that
is not opened does so too, even where it reads the weight alike (`Why.IN_BODY`): factors would come in addition to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from onnx_lowrank.graph import Graph
from onnx_lowrank.protos import BORDER, subgraphs
from onnx_lowrank.sites import Keep, Site, Why
from onnx_lowrank.values import same_values

Found = Site | Keep


def tie(
    graph: Graph, found: Sequence[Found], *, root: Callable[[int], str], plain: Callable[[int], Found]
) -> list[Found]:
    """What was found, in its order, with sites of one weight as one where the first of them stands.

    Args:
        found: by position of the node.
        root: the constant that the weight of a site comes from, by its position.
        plain: the site at a position without what follows it folded in.
    """
    at: dict[str, list[int]] = {}
    for position, one in enumerate(found):
        if isinstance(one, Site):
            at.setdefault(root(position), []).append(position)
    result = dict(enumerate(found))
    for name, positions in at.items():
        readers = graph.weight_readers(name)
        if len(readers) == 1:
            continue
        site = None
        if readers == positions:
            site = _as_one([found[p] for p in positions]) or _as_one([plain(p) for p in positions])
        if site is None:
            why = Why.IN_BODY if any(_is_body(graph, p) for p in readers if p >= 0) else Why.SHARED
            result |= {p: Keep(graph.names[p], graph.protos[p].op_type, why) for p in positions}
            continue
        result[positions[0]] = site
        for position in positions[1:]:
            del result[position]
    return list(result.values())


def _is_body(graph: Graph, reader: int) -> bool:
    """Whether a reader stands for a body that is not opened: it has one, or marks where one reads a constant."""
    node = graph.protos[reader]
    return node.name.startswith(BORDER) or any(True for _ in subgraphs(node))


def _as_one(found: Sequence[Found]) -> Site | None:
    """The first of some sites with the others as twins; None where they are not one map."""
    first, *rest = found
    if not isinstance(first, Site):
        return None
    twins = [other for other in rest if isinstance(other, Site) and _same_map(first, other)]
    if len(twins) < len(rest):
        return None
    alike = (dataclasses.replace(twin, weight=first.weight, bias=first.bias) for twin in twins)
    return dataclasses.replace(first, twins=tuple(alike))


def _same_map(one: Site, other: Site) -> bool:
    """Whether two sites compute the same; which activation follows them does not matter."""
    mine, theirs = (dataclasses.replace(site.geometry, then="") for site in (one, other))
    if mine != theirs or (one.bias is None) != (other.bias is None):
        return False
    return np.array_equal(one.bias_vector, other.bias_vector) and same_values(one.weight, other.weight)
