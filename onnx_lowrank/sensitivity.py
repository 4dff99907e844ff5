"""How much of a site's own error reaches the model's outputs: one probe a site."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from onnx_lowrank.allocate import Candidate, Choices
from onnx_lowrank.plan import Decision

_PROBED_ERROR = 0.01


def sensitivities(
    choices: Sequence[Choices],
    loss_of: Callable[[Decision], float],
    progress: Callable[[int, int], None],
) -> dict[str, float]:
    """Output loss per unit of a site's own relative error, by node (FLAR-SVD; ALGORITHMS §4).

    Each site that has candidates is rewritten alone, at the candidate whose error is nearest to 0.01.

    Args:
        loss_of: measured loss of the model with one decision carried out.
        progress: called with (probes done, probes).
    """
    probed = [c for c in choices if c.candidates]
    found: dict[str, float] = {}
    for done, choice in enumerate(probed):
        progress(done, len(probed))
        candidate = min(choice.candidates, key=_distance)
        alone = dataclasses.replace(choice.dense, kind=candidate.kind, rank=candidate.rank)
        loss = loss_of(alone)
        found[choice.dense.node] = loss / max(candidate.error, 1e-12)
    progress(len(probed), len(probed))
    return found


def _distance(candidate: Candidate) -> tuple[float, str, int]:
    return abs(math.log(max(candidate.error, 1e-12) / _PROBED_ERROR)), candidate.kind, candidate.rank
