"""When a built plan loses far more than was predicted: raise the estimates of the sites that were changed last.

Probes see few samples; a site whose error does not show on them looks free, enters the mildest plan, and with it every
other one. What the built model loses beyond the prediction tells on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from onnx_lowrank.allocate import Candidate, Choices, predicted_loss
from onnx_lowrank.plan import Decision
from onnx_lowrank.search import Found

_SLACK = 0.5  # of the limit: a plan that holds so near to it needs no better one
_WRONG = 2.0  # measured over predicted loss of a step: within it, the estimate was good enough


def explained(choices: Sequence[Choices], found: Found, limit: float) -> list[Choices] | None:
    """The choices with the estimates raised that were wrong; None when none was, or nothing is to be won.

    Args:
        found: two neighbours of the frontier, one of which holds.
        limit: largest allowed loss.
    """
    if found.fails is None or found.value > _SLACK * limit:
        return None
    mild = found.holds or tuple(choice.stay() for choice in choices)
    steps = [i for i, (a, b) in enumerate(zip(mild, found.fails, strict=True)) if _what(a) != _what(b)]
    excess = min(found.over, 1.0) - found.value
    if excess <= _WRONG * (predicted_loss(found.fails) - predicted_loss(mild)):
        return None
    errors = np.array([found.fails[i].error or 0.0 for i in steps])
    blamed = {i: excess * error / errors.sum() for i, error in zip(steps, errors, strict=True) if error > 0}
    if not blamed:
        return None
    raised = list(choices)
    for index, loss in blamed.items():
        raised[index] = _raised(raised[index], found.fails[index], loss)
    return raised


def _what(decision: Decision) -> tuple[str | None, int | None, int]:
    return decision.kind, decision.rank, decision.inner


def _raised(choice: Choices, decision: Decision, loss: float) -> Choices:
    """Candidates of the same sort as the decision lose at least in proportion to their error."""
    slope = loss / (decision.error or 1.0)

    def one(candidate: Candidate) -> Candidate:
        same = (candidate.partner is None) == (decision.partner is None)
        return dataclasses.replace(candidate, loss=max(candidate.loss, slope * candidate.error)) if same else candidate

    return dataclasses.replace(
        choice, candidates=tuple(map(one, choice.candidates)), timed=tuple(map(one, choice.timed))
    )
