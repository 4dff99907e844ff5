"""Find the plan that holds its target when it is built and measured; the additive model only proposes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from onnx_lowrank.plan import Decision

_CLOSE = 0.97  # a measured value so near below the limit ends the search


@dataclasses.dataclass(frozen=True)
class Found:
    """What was measured on both sides of the limit.

    Attributes:
        holds: the last plan that was measured to hold, with its `value`; None, and 0, when none was.
        fails: the first plan that was measured not to hold, with its value `over`; None, and infinite, when none was.
    """

    holds: tuple[Decision, ...] | None = None
    value: float = 0.0
    fails: tuple[Decision, ...] | None = None
    over: float = math.inf


def search(
    plans: Sequence[tuple[float, tuple[Decision, ...]]],
    measured: Callable[[tuple[Decision, ...]], float],
    limit: float,
    *,
    rounds: int = 10,
    scale: float = 1.0,
) -> Found:
    """The last plan whose *measured* value stays within `limit`.

    Args:
        plans: in the order of their predicted value, which comes first in each pair.
        measured: value of a built plan.
        limit: largest allowed value.
        rounds: most plans that are built.
        scale: measured over predicted value, as far as it is known.

    The additive model proposes, built models answer, and every answer corrects the model's scale. A proposal
    outside the bracket of what was measured becomes the middle of the bracket.
    """
    found, holds, fails = Found(), -1, len(plans)
    for _ in range(rounds):
        if fails - holds <= 1:
            break
        proposed = sum(predicted * scale <= limit for predicted, _ in plans) - 1
        step = proposed if holds < proposed < fails else (holds + fails) // 2
        predicted, decisions = plans[step]
        value = measured(decisions)
        if value <= limit:
            holds, found = step, dataclasses.replace(found, holds=decisions, value=value)
        else:
            fails, found = step, dataclasses.replace(found, fails=decisions, over=value)
        if _CLOSE * limit <= value <= limit:
            break
        scale = value / predicted if predicted > 0 and 0 < value < math.inf else scale
    return found
