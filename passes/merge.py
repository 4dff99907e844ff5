"""Multiply two neighbouring linear maps into one, exactly.

    before   x -[ Conv  M×C×k×k, b ]- t -[ Conv  N×M×1×1, c ]-> y           likewise MatMul and Gemm chains
    after    x -[ Conv  N×C×k×k, W₂b + c ]-> y

    before   x -[ Conv  M×C×1×1 ]- t -[ Conv  N×M×k×k, c ]-> y
    after    x -[ Conv  N×C×k×k, Σ W₂b + c ]-> y                             with b only where nothing is padded

Norms and biases that the sites have folded in go along. A stride of the second one multiplies into the first.
Left alone (`Apart`): t that anything else reads or that leaves the graph, groups, batches and ConvTransposes, two k×k
kernels, a bias that pads would cut off, a product with entries that its type cannot hold, products that cost no less:
by measured time, which takes a product with up to `MOST` times the multiply-adds too (factors that are slower than the
dense weight they stand for); by multiply-adds where no time is known.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from onnx_lowrank.fragment import Fragment, Op, Y, dtype_of
from onnx_lowrank.graph import Graph, Patch
from onnx_lowrank.linalg import Array
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.passes.fold import only_reader
from onnx_lowrank.sites import Geometry, Site

MERGE = "merge"
MOST = 1.5
"""Times the multiply-adds and the entries of the pair that a product which has more may have, however fast it is."""


class Apart(enum.Enum):
    """Why two sites, one of which alone reads the other, stay two."""

    KINDS = "their operators cannot be written as one"
    KERNELS = "both have a kernel"
    BIAS = "pads of the second one cut the bias of the first"
    STRIDES = "pads or strides between them"
    RANGE = "the product has entries that its type cannot hold"
    COST = "the product would cost no less"


@dataclasses.dataclass(frozen=True)
class Merge:
    """Two sites and their product; multiply-adds of a run before and after."""

    first: Site
    second: Site
    product: Site
    macs_before: int
    macs_after: int

    @property
    def is_cheaper(self) -> bool:
        """Whether the product has fewer multiply-adds."""
        return self.macs_after < self.macs_before

    @property
    def is_small(self) -> bool:
        """Whether the product has at most `MOST` times the multiply-adds and the entries."""
        entries = self.first.weight.size + self.second.weight.size
        return self.macs_after <= MOST * self.macs_before and self.product.weight.size <= MOST * entries

    def patch(self) -> Patch:
        """Both sites as one node, which has the name of the second."""
        made = _dense(self.product)
        ops = (dataclasses.replace(made.ops[0], name=""), *made.ops[1:])
        site = self.second
        nodes = (*self.first.nodes, *site.nodes)
        return Patch(site.name, nodes, self.first.x, site.y, Fragment(ops, made.constants), MERGE, (self.first.name,))

    def pair(self) -> Fragment:
        """Both sites as they are, as one fragment."""
        one, two = (_renamed(_dense(site), end) for site, end in ((self.first, "_a"), (self.second, "_b")))
        ops = [dataclasses.replace(op, output="between" if op.output == Y else op.output) for op in one.ops]
        ops += [
            dataclasses.replace(op, inputs=tuple("between" if i == "x" else i for i in op.inputs)) for op in two.ops
        ]
        return Fragment(tuple(ops), {**one.constants, **two.constants})

    def whole(self) -> Fragment:
        """The product, as a fragment."""
        return _dense(self.product)


def merges(
    graph: Graph, sites: Sequence[Site], macs: Mapping[str, int], wanted: Callable[[Merge], bool]
) -> Iterator[Merge | tuple[Site, Site, Apart]]:
    """The pairs of neighbours, each with its product or the reason why it has none; no site in two of them.

    Args:
        sites: with the shapes that a run has shown.
        macs: multiply-adds of each site in that run.
        wanted: whether a product takes the place of its pair; one that does not leaves both to other neighbours.
    """
    at = {site.nodes[0]: site for site in sites}
    taken: set[str] = set()
    for first in sites:
        position = only_reader(graph, first.y)
        second = None if position is None else at.get(position)
        if second is None or second.x != first.y or taken.intersection((first.name, second.name)):
            continue
        found = product(first, second)
        if isinstance(found, Apart):
            yield first, second, found
            continue
        before = macs[first.name] + macs[second.name]
        after = macs[second.name] // second.weight.size * found.weight.size
        one = Merge(first, second, found, before, after)
        if not wanted(one):
            yield first, second, Apart.COST
            continue
        taken |= {first.name, second.name}
        yield one


def product(first: Site, second: Site) -> Site | Apart:
    """One site that computes what the second computes of the output of the first."""
    one, two = first.geometry, second.geometry
    plain = {"Conv", "MatMul", "Gemm"}.issuperset((one.op, two.op)) and max(one.groups, two.groups) == 1
    if not plain or one.dtype != two.dtype or one.side != two.side or one.batch or two.batch or two.trans_a:
        return Apart.KINDS
    if "Conv" not in (one.op, two.op):
        return _written(first, second, second.weight.astype(np.float64), _joined(one, two))
    if one.op != two.op or len(one.kernel) != len(two.kernel):
        return Apart.KINDS
    if two.pointwise:
        if any(two.pads) or (_strided(two) and one.auto_pad.startswith("SAME")):
            return Apart.STRIDES
        strides = tuple(a * b for a, b in zip(one.strides, two.strides, strict=True))
        return _written(first, second, second.weight.astype(np.float64), dataclasses.replace(one, strides=strides))
    if not one.pointwise:
        return Apart.KERNELS
    if any(one.pads) or _strided(one):
        return Apart.STRIDES
    if first.bias_vector.any() and (any(two.pads) or two.auto_pad.startswith("SAME")):
        return Apart.BIAS
    return _behind_a_mix(first, second)


def _strided(geometry: Geometry) -> bool:
    return any(s != 1 for s in geometry.strides)


def _joined(one: Geometry, two: Geometry) -> Geometry:
    """Gemm where either is one: it takes matrices only, so that both see them."""
    return dataclasses.replace(one, op="Gemm" if "Gemm" in (one.op, two.op) else "MatMul", bias=one.bias or two.bias)


def _written(first: Site, second: Site, mixing: Array, geometry: Geometry) -> Site | Apart:
    """The first site with its outputs mixed (N×M)."""
    weight = mixing @ first.weight.astype(np.float64)
    return _site(first, second, weight, mixing @ first.bias_vector + second.bias_vector, geometry)


def _behind_a_mix(first: Site, second: Site) -> Site | Apart:
    """The second site, a k×k convolution, with its inputs mixed by the first."""
    two = second.geometry
    taps = second.weight.astype(np.float64).reshape(two.outputs, two.channels, -1)
    mixing = first.weight.astype(np.float64)
    weight = np.einsum("nmt,mc->nct", taps, mixing, optimize=True).reshape(two.outputs, -1)
    bias = taps.sum(2) @ first.bias_vector + second.bias_vector
    return _site(first, second, weight, bias, dataclasses.replace(two, channels=mixing.shape[1]))


def _site(first: Site, second: Site, weight: Array, bias: Array, geometry: Geometry) -> Site | Apart:
    with np.errstate(over="ignore"):
        kept = weight.astype(dtype_of(geometry))
    if not np.isfinite(kept.astype(np.float64)).all():
        return Apart.RANGE
    outputs, inputs = weight.shape
    geometry = dataclasses.replace(
        geometry, outputs=outputs, inputs=inputs, then=second.geometry.then, x_shape=first.geometry.x_shape
    )
    return dataclasses.replace(
        second, geometry=geometry, weight=kept, bias=bias if geometry.bias else None, x=first.x, x_shapes=first.x_shapes
    )


def _dense(site: Site) -> Fragment:
    return dense_fragment(site.geometry, site.weight.astype(np.float64), site.bias_vector)


def _renamed(fragment: Fragment, end: str) -> Fragment:
    """The fragment with names of its own for all but its ends."""

    def named(name: str) -> str:
        return name if name in ("x", Y) else name + end

    ops = tuple(
        Op(op.name + end, op.op, tuple(map(named, op.inputs)), named(op.output), op.attributes) for op in fragment.ops
    )
    return Fragment(ops, {name + end: array for name, array in fragment.constants.items()})
