"""Write a convolution as a small grouped one between two changes of channels.

    before   x -[ Conv  N×C×k×k, b ]-> y
    after    x -[ Conv  s×C×1×1 ]- t -[ Conv  r×(s/g)×k×k, group=g ]- u -[ Conv  N×r×1×1, b ]-> y

`tucker` with a block-diagonal core, a sum of g small ones (layer branching, arXiv 2407.20266). Which channels a
group has is free, as both 1×1 factors absorb any mixing; it is fitted with the blocks (branching.py), where the paper
keeps the blocks of a given core. Strides, pads and dilations go to the middle one, the bias to the last. Exact where
the weight is such a sum. Cost Cs + k²sr/g + rN multiply-adds; where there is a stride, the first factor also computes
positions that the second one skips, which the measured time includes.
Left alone: 1×1 and grouped convolutions; patches of more than 2400 entries, where a fit takes seconds at every size.
"""

from __future__ import annotations

import functools
import math

from onnx_lowrank.fragment import Kind, Shapes
from onnx_lowrank.passes.tucker import TUCKER, three_convolutions
from onnx_lowrank.sites import Geometry

_MOST = 2400


def branch_cost(geometry: Geometry, rank: int, inner: int, groups: int) -> int:
    """Multiply-adds per output position, stride one; and numbers stored."""
    taps = math.prod(geometry.kernel)
    return geometry.channels * inner + taps * inner * rank // groups + rank * geometry.outputs


def _shapes(geometry: Geometry, rank: int, inner: int, groups: int) -> Shapes:
    taps = math.prod(geometry.kernel)
    return (inner, geometry.channels), (rank, inner // groups * taps), (geometry.outputs, rank)


def _largest(geometry: Geometry) -> int:
    """Above half of the channels `spatial` is better, and fits take long."""
    return min(geometry.channels // 2, geometry.outputs)


def branch(groups: int) -> Kind:
    """The kind whose core has so many groups."""
    return Kind(
        name=f"branch{groups}",
        applies=lambda geometry: TUCKER.applies(geometry) and groups <= _largest(geometry) and geometry.inputs <= _MOST,
        cost=functools.partial(branch_cost, groups=groups),
        build=functools.partial(three_convolutions, groups=groups),
        split="channels",
        shapes=functools.partial(_shapes, groups=groups),
        full=lambda geometry: geometry.outputs,
        inner_full=_largest,
        terms=groups,
    )


BRANCH2, BRANCH4, BRANCH8 = (branch(groups) for groups in (2, 4, 8))
