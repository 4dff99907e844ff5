"""Find the plan that holds its target when it is built and measured; the additive model only proposes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx_lowrank.plan import Decision

_CLOSE = 0.97  # a measured value so near below the limit ends the search


def search(
    plans: Sequence[tuple[float, tuple[Decision, ...]]],
    measured: Callable[[tuple[Decision, ...]], float],
    limit: float,
    *,
    rounds: int = 10,
    scale: float = 1.0,
) -> tuple[tuple[Decision, ...], float] | None:
    """The last plan whose *measured* value stays within `limit`, with that value; None when none was found to.

    Args:
        plans: in the order of their predicted value, which comes first in each pair.
        measured: value of a built plan.
        limit: largest allowed value.
        rounds: most plans that are built.
        scale: measured over predicted value, as far as it is known.

    The additive model proposes, built models answer, and every answer corrects the model's scale. A proposal
    outside the bracket of what was measured becomes the middle of the bracket.
    """
    holds, fails, value = -1, len(plans), 0.0
    for _ in range(rounds):
        if fails - holds <= 1:
            break
        proposed = sum(predicted * scale <= limit for predicted, _ in plans) - 1
        step = proposed if holds < proposed < fails else (holds + fails) // 2
        predicted, decisions = plans[step]
        found = measured(decisions)
        if found <= limit:
            holds, value = step, found
        else:
            fails = step
        if _CLOSE * limit <= found <= limit:
            break
        scale = found / predicted if predicted > 0 and 0 < found < float("inf") else scale
    return (plans[holds][1], value) if holds >= 0 else None
