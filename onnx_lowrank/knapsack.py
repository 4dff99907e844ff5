"""One target, solved as a whole: the multiple-choice knapsack as an integer program (ALGORITHMS §4)."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import scipy.optimize
import scipy.sparse

from onnx_lowrank.allocate import Choices, Cost, Picks, together
from onnx_lowrank.plan import Decision

_MILP_SECONDS = 10.0


def settle(
    choices: Sequence[Choices], *, least: Cost | Literal["loss"], limited: Cost | Literal["loss"], limit: float
) -> tuple[Decision, ...] | None:
    """One target, solved as a whole: the plan with the least sum of `least` whose sum of `limited` is in `limit`.

    None when no plan is within the limit. Ties and gaps below 0.1 % are left as the solver finds them.
    """
    options: list[Picks | int] = []
    for index, choice in enumerate(choices):
        options.append(index)
        options.extend(((index, candidate),) for candidate in choice.alone)
    options.extend(together(choices))

    def sums(of: Cost | Literal["loss"]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        def value(option: Picks | int) -> float:
            if isinstance(option, int):
                return 0.0 if of == "loss" else choices[option].cost(of)
            return sum(float(getattr(candidate, of)) for _, candidate in option)

        return np.array([value(option) for option in options])

    goal, bound = sums(least), sums(limited)
    scale = max(abs(limit), 1e-12)
    with _silent():
        found = scipy.optimize.milp(
            goal / max(goal.max(), 1e-12),
            integrality=np.ones(len(options), np.int64),
            bounds=scipy.optimize.Bounds(0, 1),
            constraints=[
                scipy.optimize.LinearConstraint(_once(options), 1, 1),
                scipy.optimize.LinearConstraint((bound / scale)[None, :], -np.inf, limit / scale),
            ],
            options={"mip_rel_gap": 1e-3, "time_limit": _MILP_SECONDS},
        )
    if found.x is None:
        return None
    chosen = [choice.stay() for choice in choices]
    for taken, option in zip(found.x, options, strict=True):
        if taken > 0.5 and not isinstance(option, int):
            for index, candidate in option:
                chosen[index] = choices[index].become(candidate)
    return tuple(chosen)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches stdout: HiGHS prints a line now and then, whatever it is told, and `--json` is one JSON object.

    It prints by C's stdio, whose buffer has to be empty before and after.
    """
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else ctypes.CDLL("ucrtbase").fflush
    flush(None)
    try:
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # closed: there is nothing to be kept clean
        yield
        return
    try:
        os.dup2(nowhere, 1)
        yield
        flush(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _once(options: Sequence[Picks | int]) -> scipy.sparse.csr_array:
    """One row for every site: the options that decide it, one of which is taken."""
    decided = [
        (index, column)
        for column, option in enumerate(options)
        for index in ([option] if isinstance(option, int) else [site for site, _ in option])
    ]
    sites, columns = zip(*decided, strict=True)
    return scipy.sparse.csr_array((np.ones(len(decided)), (sites, columns)))
