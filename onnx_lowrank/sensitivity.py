"""How much of a site's own error reaches the model's outputs: a few probes a site, and a curve through them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

TARGETS = (0.01, 0.08)
"""Errors of the site's own output at which it is probed, where such ranks exist."""

Key = TypeVar("Key", bound=Hashable)

_LINEAR = 1.5  # the two slopes may differ by this factor before a third probe is made
_LEAST = 1e-3  # of the median slope


@dataclasses.dataclass(frozen=True)
class Response:
    """Loss of the model's outputs by the error of one site's own output, from probes (ALGORITHMS §4; FLAR-SVD).

    Attributes:
        points: (error, loss), errors ascending; the curve starts at (0, 0) and goes on as it ends.
    """

    points: tuple[tuple[float, float], ...]

    def loss(self, error: float) -> float:
        """Estimated loss at a local error; linear between the probes and proportional beyond the last."""
        last_error, last_loss = self.points[-1]
        if error >= last_error:
            return last_loss * error / last_error if last_error > 0 else last_loss
        errors, losses = zip(*self.points, strict=True)
        return float(np.interp(error, (0.0, *errors), (0.0, *losses)))

    @property
    def linear(self) -> bool:
        """Whether loss over error is the same at all probes, within a factor of 1.5."""
        slopes = [loss / error for error, loss in self.points if error > 0]
        return not slopes or max(slopes) <= _LINEAR * max(min(slopes), 1e-300)

    @property
    def checked(self) -> bool:
        """Whether `linear` says anything: one probe is always on a straight line."""
        return len(self.points) > 1


def floored(found: Mapping[Key, Response]) -> dict[Key, Response]:
    """Responses of sites whose error shows on no probed sample, raised to a small share of the median site's.

    Few samples may exercise few of a site's outputs; an error that reaches the model's outputs not at all is not to be
    believed, and a site that looks free would be rewritten first.
    """
    slopes = [loss / error for r in found.values() for error, loss in r.points[-1:] if error > 0]
    least = _LEAST * float(np.median(slopes)) if slopes else 0.0
    return {
        name: Response(tuple((error, max(loss, least * error)) for error, loss in response.points))
        for name, response in found.items()
    }


def probe_ranks(errors: Mapping[int, float], probes: int) -> tuple[int, ...]:
    """Ranks to probe first: those whose errors are nearest to the targets.

    Args:
        errors: relative local error by rank, candidates only.
        probes: at most so many, 1 or 2.
    """
    usable = {rank: error for rank, error in errors.items() if error > 0}
    targets = TARGETS[:probes] if probes > 1 else (math.sqrt(TARGETS[0] * TARGETS[1]),)
    nearest = [min(usable, key=lambda r: (abs(math.log(usable[r] / target)), r)) for target in targets if usable]
    return tuple(sorted(set(nearest)))


def spare_probes(sites: int, curves: int, most: int) -> int:
    """Probes beyond the first of each curve: two for everyone where all sites can have a second, else what is left.

    Args:
        curves: a site has one for its ranks and, at the end of a hidden layer, one for the widths of that.
        most: probes that the budget holds.
    """
    return 2 * curves if 2 * sites <= most else max(most - curves, 0)


def responses(
    curves: Sequence[tuple[Key, Mapping[int, float]]],
    loss_of: Callable[[Key, int], float],
    progress: Callable[[int, int], None],
    *,
    spare: int,
) -> dict[Key, Response]:
    """Probe every curve alone: twice while probes are spare, and where the two are not on a line, between them.

    Args:
        curves: whose it is, and relative local error by rank; only ranks that may be chosen. The first ones get the
            spare probes.
        loss_of: measured loss of the model with one site at one rank.
        progress: called with (curves done, curves).
        spare: probes beyond the first of each curve, at most.
    """
    found: dict[Key, Response] = {}
    for done, (key, errors) in enumerate(curves):
        progress(done, len(curves))
        response = _probed(errors, functools.partial(loss_of, key), spare)
        if response is not None:
            found[key] = response
            spare -= len(response.points) - 1
    progress(len(curves), len(curves))
    return found


def _probed(errors: Mapping[int, float], loss_of: Callable[[int], float], spare: int) -> Response | None:
    points = {rank: loss_of(rank) for rank in probe_ranks(errors, 2 if spare > 0 else 1)}
    response = _response(errors, points)
    if response is None or response.linear or len(points) > spare:
        return response
    between = _between(errors, list(points))
    return response if between is None else _response(errors, {**points, between: loss_of(between)})


def _response(errors: Mapping[int, float], losses: Mapping[int, float]) -> Response | None:
    points = sorted((errors[rank], loss) for rank, loss in losses.items())
    return Response(tuple(points)) if points else None


def _between(errors: Mapping[int, float], probed: Sequence[int]) -> int | None:
    low, high = min(probed), max(probed)
    inner = [rank for rank in errors if low < rank < high and errors[rank] > 0]
    middle = math.sqrt(max(errors[low], 1e-300) * max(errors[high], 1e-300))
    return min(inner, key=lambda r: (abs(math.log(errors[r] / middle)), r), default=None)
