"""Let sites that read the same tensor share their first factor: queries, keys and values, parallel convolutions.

    before   x -[ W₁  N₁×K, b₁ ]-> y₁;   x -[ W₂  N₂×K, b₂ ]-> y₂;   …
    after    x -[ down  r×K ]- p -[ up₁  (N₁−r)×r ]- q;   Concat(p, q) or Concat(q, p) -> y₁
                                 -[ up₂  N₂×r ]-> y₂;   …

One projection of x is fitted to all their weights, stacked. Its r channels are the first or the last r outputs of one
of the sites, whichever needs the smallest coefficients; the others are combinations of them, so that one Concat is
all the memory that is moved (decision 065). Cost r(K + N₁ + N₂ + … − r) multiply-adds: below dense for every r < K.
Left alone: sites with other kernels, strides or biases, grouped ones (`families.Apart`); ranks above the outputs of
every site; all of them where 8 bits are asked for, because nothing is known of what they do to common pivots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.fragment import Fragment, Op, X, Y
from onnx_lowrank.linalg import Array, common_pivots
from onnx_lowrank.passes.linear import AMPLIFIED, affine, amplification, joined
from onnx_lowrank.sites import Geometry

SHARED = "shared"


@dataclasses.dataclass(frozen=True)
class Pivots:
    """Which outputs the common factor computes, and how all others follow.

    Attributes:
        owner: the site that they are outputs of.
        rows: its first r outputs or its last r.
        coefficients: by site: of all its outputs N×r, of the owner's others (N−r)×r.
    """

    owner: int
    rows: slice
    coefficients: tuple[Array, ...]

    @classmethod
    def of(cls, lefts: Sequence[Array]) -> Pivots:
        """The pivots of left factors N×r of a common right factor."""
        return cls(*common_pivots(lefts))

    def usable(self, geometry: Geometry) -> bool:
        """Whether the coefficients do not amplify the rounding of the stored type."""
        return all(amplification(geometry, one) <= AMPLIFIED for one in self.coefficients)


def shared_factor(
    names: Sequence[str], geometries: Sequence[Geometry], pivots: Pivots, down: Array, biases: Sequence[Array]
) -> Fragment:
    """All sites of a set: outputs in their order.

    Args:
        names: of the sites, which their nodes are called after.
        down: weight of the pivots, r×K.
        biases: of the sites, each N.
    """
    first, owner = geometries[0], names[pivots.owner]
    own_bias = first.op != "MatMul"  # a MatMul has its Add after the Concat, where the runtime fuses it
    pivot_bias = biases[pivots.owner][pivots.rows]
    ops, constants = affine(first, "down", X, "pivots", down, pivot_bias if own_bias else None, first=True)
    made = [dataclasses.replace(op, owner=owner) for op in ops]
    outputs = output_names(len(names))
    for index, (geometry, bias, up) in enumerate(zip(geometries, biases, pivots.coefficients, strict=True)):
        mine = index == pivots.owner
        rest = np.delete(bias, pivots.rows) if mine else bias
        moved = rest - up @ pivot_bias if own_bias else None if mine else rest
        target = "rest" if mine else outputs[index]
        more, constants_up = affine(geometry, f"up{index}", "pivots", target, up, moved, first=False)
        if mine:
            parts = ("pivots", "rest") if pivots.rows.start == 0 else ("rest", "pivots")
            tail, constants_tail = joined(geometry, "concat", parts, outputs[index], bias)
            more, constants_up = (*more, *tail), {**constants_up, **constants_tail}
        made += [dataclasses.replace(op, owner=names[index]) for op in more]
        constants = {**constants, **constants_up}
    return Fragment(tuple(made), constants, outputs)


def side_by_side(names: Sequence[str], geometries: Sequence[Geometry], weights: Sequence[Array]) -> Fragment:
    """The same sites dense, to be timed against."""
    made: list[Op] = []
    constants: dict[str, npt.NDArray[Any]] = {}
    outputs = output_names(len(names))
    for index, (geometry, weight) in enumerate(zip(geometries, weights, strict=True)):
        bias = np.zeros(geometry.outputs)
        ops, more = affine(geometry, f"dense{index}", X, outputs[index], weight, bias, first=True)
        made += [dataclasses.replace(op, owner=names[index]) for op in ops]
        constants |= more
    return Fragment(tuple(made), constants, outputs)


def output_names(count: int) -> tuple[str, ...]:
    """Local names of so many outputs."""
    return (Y, *(f"{Y}{index}" for index in range(1, count)))


def shared_cost(geometries: Sequence[Geometry], owner: int, rank: int) -> tuple[int, ...]:
    """Multiply-adds per position of each site's nodes, the common factor counted to the owner of the pivots."""
    inputs = geometries[0].inputs
    return tuple(
        rank * (inputs + g.outputs - rank) if index == owner else rank * g.outputs for index, g in enumerate(geometries)
    )


def most_rank(geometries: Sequence[Geometry]) -> int:
    """Largest rank that saves multiply-adds and whose pivots are outputs of one site."""
    return min(geometries[0].inputs - 1, max(g.outputs for g in geometries))
