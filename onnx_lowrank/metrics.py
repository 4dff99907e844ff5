"""What a loss can be: relative squared error, cosine, top-1 disagreement, KL divergence, or the user's function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import scipy.special

from onnx_lowrank.errors import DataError, SettingsError
from onnx_lowrank.loaders import function
from onnx_lowrank.settings import suggestion
from onnx_lowrank.validation import Loss, NewLoss

Array = npt.NDArray[Any]


class RelativeLoss:
    """Relative squared error `Σ‖y − ŷ‖² / Σ‖y‖²`, per output, averaged over the outputs with their weights.

    Outputs that are not floating point count the share of entries that differ. A result that is not finite
    where the original is, or of another shape, is an infinite loss.
    """

    def __init__(self, names: Sequence[str] = (), weights: Mapping[str, float] | None = None) -> None:
        self._weights = [(weights or {}).get(name, 1.0) for name in names]
        self._rows: list[list[tuple[float, float]]] = []
        self.per_sample: list[float] = []

    def add(self, reference: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Count one sample."""
        pairs = zip(reference, outputs, strict=True)
        self._rows.append([_difference(np.asarray(y), np.asarray(other)) for y, other in pairs])
        self.per_sample.append(max((_ratio(*pair) for pair in self._rows[-1]), default=0.0))

    def value(self) -> float:
        """The loss over all samples so far; 0 when there are none."""
        return _weighted([_ratio(sum(e), sum(p)) for e, p in self._outputs()], self._weights)

    def influences(self) -> list[float]:
        """How far each sample moves the ratios of sums (Cochran, Sampling Techniques, 1977, §2.11 and §6.4)."""
        moved = [_moved(np.array(e), np.array(p)) for e, p in self._outputs()]
        return [_weighted(row, self._weights) for row in zip(*moved, strict=True)]

    def _outputs(self) -> list[tuple[list[float], list[float]]]:
        """Errors and powers of every output, one entry a sample."""
        return [([e for e, _ in column], [p for _, p in column]) for column in zip(*self._rows, strict=True)]


class MeanLoss:
    """A loss of each sample and output, averaged over the samples, then over the outputs with their weights."""

    def __init__(
        self, of: Callable[[Array, Array], float], names: Sequence[str] = (), weights: Mapping[str, float] | None = None
    ) -> None:
        self._of = of
        self._weights = [(weights or {}).get(name, 1.0) for name in names]
        self._rows: list[list[float]] = []
        self.per_sample: list[float] = []

    def add(self, reference: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Count one sample."""
        row = [self._one(np.asarray(y), np.asarray(other)) for y, other in zip(reference, outputs, strict=True)]
        self._rows.append(row)
        self.per_sample.append(max(row, default=0.0))

    def _one(self, y: Array, other: Array) -> float:
        if y.shape != other.shape or not np.isfinite(other.astype(np.float64)).all():
            return math.inf
        return self._of(y, other) if y.size else 0.0

    def value(self) -> float:
        """The loss over all samples so far; 0 when there are none."""
        if not self._rows:
            return 0.0
        return _weighted(list(np.mean(self._rows, axis=0)), self._weights)

    def influences(self) -> list[float]:
        """How far each sample moves the mean."""
        return _about_the_mean([_weighted(row, self._weights) for row in self._rows])


class UserLoss:
    """`function(reference, outputs)` of two dicts by output name, for each sample; the mean is the loss."""

    def __init__(self, of: Callable[[dict[str, Any], dict[str, Any]], float], where: str, names: Sequence[str]) -> None:
        self._of, self._where, self._names = of, where, names
        self.per_sample: list[float] = []

    def add(self, reference: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Count one sample.

        Raises:
            DataError: the function fails or returns no number.
        """
        pair = (dict(zip(self._names, values, strict=True)) for values in (reference, outputs))
        try:
            value = float(self._of(*pair))
        except Exception as fault:  # the user's code may raise anything
            raise DataError(f"{self._where}: {type(fault).__name__}: {fault}") from None
        if math.isnan(value):
            raise DataError(f"{self._where}: returned NaN; give a number, 0 for equal outputs")
        self.per_sample.append(value)

    def value(self) -> float:
        """The mean so far; 0 when there are no samples."""
        return float(np.mean(self.per_sample)) if self.per_sample else 0.0

    def influences(self) -> list[float]:
        """How far each sample moves the mean."""
        return _about_the_mean(self.per_sample)


def cosine(y: Array, other: Array) -> float:
    """1 − cosine of the flattened outputs; 0 where both are zero."""
    a, b = y.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norm == 0:
        return 0.0 if np.array_equal(a, b) else 1.0
    return max(0.0, 1.0 - float(a @ b) / norm)


def top1(y: Array, other: Array) -> float:
    """Share of positions whose largest entry along the last axis is another one."""
    if y.ndim == 0:
        return float(y != other)
    return float(np.mean(y.argmax(-1) != other.argmax(-1)))


def kl(y: Array, other: Array) -> float:
    """Mean KL divergence in nats along the last axis, of probabilities as they are or of logits after softmax."""
    if y.ndim == 0:
        return 0.0
    p, q = y.astype(np.float64), other.astype(np.float64)
    if (p >= 0).all() and np.allclose(p.sum(-1), 1.0, atol=1e-3):
        tiny = np.finfo(np.float64).tiny
        log_p, log_q = np.log(np.maximum(p, tiny)), np.log(np.maximum(q, 1e-12))
    else:
        log_p, log_q = scipy.special.log_softmax(p, axis=-1), scipy.special.log_softmax(q, axis=-1)
        p = np.exp(log_p)
    return max(0.0, float(np.mean(np.sum(p * (log_p - log_q), axis=-1))))


_MEANS: dict[str, Callable[[Array, Array], float]] = {"cosine": cosine, "top1": top1, "kl": kl}


def new_loss(metric: str, outputs: Sequence[str], weights: Mapping[str, float]) -> NewLoss:
    """A maker of loss counters for a metric.

    Args:
        metric: `relative`, `cosine`, `top1`, `kl`, or `file.py:function`.
        outputs: names of the model's outputs.
        weights: by output name.

    Raises:
        SettingsError: a weight for no output, or for the user's function.
        DataError: the user's file or function is missing or fails.
    """
    for name in weights:
        if name not in outputs:
            raise SettingsError(f"output_weights: the model has no output '{name}'{suggestion(name, outputs)}")
    if metric == "relative":
        return functools.partial(RelativeLoss, weights=weights)
    if metric in _MEANS:
        return functools.partial(_mean_loss, _MEANS[metric], weights)
    file, _, name = metric.rpartition(":")
    if weights:
        raise SettingsError("output_weights: your own metric weights the outputs itself")
    return functools.partial(UserLoss, cast("Callable[..., float]", function(Path(file), name)), metric)


def _mean_loss(of: Callable[[Array, Array], float], weights: Mapping[str, float], names: Sequence[str]) -> Loss:
    return MeanLoss(of, names, weights)


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    if not values:
        return 0.0
    used = list(weights) or [1.0] * len(values)
    total = sum(used)
    return float(sum(w * v for w, v in zip(used, values, strict=True) if w) / total) if total else 0.0


def _ratio(error: float, power: float) -> float:
    if error == 0:
        return 0.0
    return error / power if power > 0 else float("inf")


def _moved(errors: Array, powers: Array) -> list[float]:
    """How far each sample moves the ratio of the sums."""
    total = float(powers.sum())
    return list((errors - errors.sum() / total * powers) / total) if total else [0.0] * len(errors)


def _about_the_mean(values: Sequence[float]) -> list[float]:
    """How far each value is off the mean, over their number."""
    return list((np.asarray(values) - np.mean(values)) / len(values))


def _difference(y: Array, other: Array) -> tuple[float, float]:
    if y.shape != other.shape:
        return float("inf"), 1.0
    if y.dtype.kind != "f":
        return float(np.sum(y != other)), float(max(y.size, 1))
    finite = np.isfinite(y)
    wide, wide_other = y.astype(np.float64)[finite], other.astype(np.float64)[finite]
    error = float(np.sum((wide - wide_other) ** 2))
    return (error if np.isfinite(error) else float("inf")), float(np.sum(wide**2))
