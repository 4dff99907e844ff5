"""How much a fit stands on: the positions that calibration saw, and how many directions they spread over."""

from __future__ import annotations

import dataclasses

from onnx_lowrank.linalg import Array, effective_rank
from onnx_lowrank.sites import Site

FEW = 4
"""Positions for each dimension of a second moment, below which it is shrunk, and a user is warned."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """How much a fit stands on.

    Attributes:
        positions: vectors that were seen, of the site's input or of its output.
        width: entries of each (for groups, of those of one).
        effective_rank: of their second moment, the mean taken out where it can be corrected (the least of the groups).
        patches: of the input that were sampled for nested kinds; 0 where there is no such fit.
    """

    positions: int
    width: int
    effective_rank: float
    patches: int = 0

    @property
    def few(self) -> bool:
        """Whether positions are too few to trust the second moment alone."""
        return self.positions < FEW * self.width


def evidence_of(site: Site, second: Array, count: int) -> Evidence:
    """The evidence of a site from its second moment, of `count` positions."""
    groups = site.geometry.groups
    width = len(second) // groups
    blocks = (second[i * width : (i + 1) * width, i * width : (i + 1) * width] for i in range(groups))
    return Evidence(count, width, min(map(effective_rank, blocks)))
