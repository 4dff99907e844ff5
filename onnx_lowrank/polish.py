"""Factors of one site at the size that was chosen for it: better than the closed forms, which hold at every size."""

from __future__ import annotations

import dataclasses

import numpy as np

from onnx_lowrank.alternating import alternated
from onnx_lowrank.branching import spread
from onnx_lowrank.calibration import Fit, factors
from onnx_lowrank.fragment import Kind, split_width
from onnx_lowrank.linalg import Array
from onnx_lowrank.rectified import rectified
from onnx_lowrank.separable import nested_least_squares
from onnx_lowrank.sites import Site

_MOST = 2400  # entries of a patch: above, alternating takes most of a refit's time and wins a twentieth of the error


@dataclasses.dataclass(frozen=True)
class Seen:
    """What entered a site, and what should have left it before the ReLU that alone reads it.

    Attributes:
        x: P×K, of the precision to reckon in.
        y: P×N, of the same.
    """

    x: Array
    y: Array


@dataclasses.dataclass(frozen=True)
class Task:
    """What the factors of a site approximate.

    Attributes:
        weight: N×K, in the metric of the site's fit.
        covariance: of the site's inputs, K×K.
        mean: of the same.
        seen: vectors to fit the last factor to what a ReLU lets through; None where no ReLU alone reads the output.
    """

    weight: Array
    covariance: Array
    mean: Array
    seen: Seen | None = None


def polished(
    site: Site, fit: Fit, kind: Kind, size: tuple[int, int], task: Task, *, alternate: bool
) -> tuple[Array, ...]:
    """The factors of a kind at a size (rank, inner rank), and last the bias (N).

    Nested factors are alternated in the metric of the data where that is asked for and patches are not too wide; then
    the last factor is fitted to what a ReLU lets through.
    """
    rank, inner = size
    if alternate and kind.split is not None and kind.terms == 1 and site.geometry.inputs <= _MOST:
        width, known = split_width(site.geometry, kind.split), fit.nested[kind.split]
        first = alternated(task.weight, task.covariance, known.vertical[: inner or rank], width, rank if inner else 0)
        better = nested_least_squares(task.weight, task.covariance, task.mean, width, known.count, first)
        fit = dataclasses.replace(fit, nested={kind.split: better})
    *parts, bias = factors(site, fit, kind, rank, inner)
    if task.seen is None or not site.centred:
        return *parts, bias
    last = 0 if kind.split is None else -1
    features = thin(kind, [part.astype(task.seen.x.dtype) for part in parts], task.seen.x)
    left, moved = rectified(features, task.seen.y, parts[last], bias)
    if kind.split is None and not kind.usable(site.geometry, left):
        return *parts, bias
    parts[last] = left
    return *parts, moved


def thin(kind: Kind, parts: list[Array], x: Array) -> Array:
    """What the last factor reads, P×m, for inputs x (P×K)."""
    if kind.split is None:
        return np.asarray(x @ parts[1].T)
    first = parts[0]
    by_column = x.reshape(len(x), first.shape[1], -1)
    features = np.einsum("rc,pcj->prj", first, by_column, optimize=True).reshape(len(x), -1)
    return features if len(parts) == 2 else np.asarray(features @ spread(parts[1], kind.terms).T)
