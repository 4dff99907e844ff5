"""How much a fit stands on: the positions that calibration saw, and how many directions they spread over."""

from __future__ import annotations

import dataclasses

import numpy as np

from onnx_lowrank.linalg import Array, Factorization, effective_rank
from onnx_lowrank.sites import Site

FEW = 4
"""Positions for each dimension of a second moment, below which it is shrunk, and a user is warned."""
ERRORS = (0.1, 0.01, 0.001)
"""Relative errors of an output at which a spectrum is summed up."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """How much a fit stands on.

    Attributes:
        positions: vectors that were seen, of the site's input or of its output.
        width: entries of each (for groups, of those of one).
        effective_rank: of their second moment, the mean taken out where it can be corrected (the least of the groups).
        patches: of the input that were sampled for nested kinds; 0 where there is no such fit.
        ranks: least ranks that leave at most each of `ERRORS` of the output's power (of each group).
    """

    positions: int
    width: int
    effective_rank: float
    patches: int = 0
    ranks: tuple[int, ...] = ()

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


def ranks_within(spectrum: Factorization) -> tuple[int, ...]:
    """The least rank for each of `ERRORS`, by Eckart–Young: what is left out is the tail of the spectrum."""
    left = np.concatenate([np.cumsum(spectrum.values[::-1])[::-1], [0.0]])
    return tuple(int(np.argmax(left <= error * spectrum.total)) for error in ERRORS)
