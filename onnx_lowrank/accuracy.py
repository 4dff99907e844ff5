"""How the outputs of two models differ, output by output: tolerances, cosine, SQNR, worst sample, top-k agreement."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.runtime import Feed, Session

Array = npt.NDArray[Any]

_CLASS_NAMES = re.compile(r"logit|prob|class|label|score|softmax", re.IGNORECASE)
_MOST_CLASSES_ALONE = 2000


class OutputDistance:
    """Distance of one output over the samples: the original's y and the other model's ŷ, in float64."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self._abs = self._rel = self._peak = 0.0
        self._yy = self._zz = self._yz = self._error = 0.0
        self._worst = (-1, -1.0)
        self._differ = self._entries = 0
        self._ranked: list[tuple[int, int, int]] = []
        self._numbers, self._classes = True, True

    def add(self, reference: Any, output: Any) -> None:
        """Count one sample."""
        y, z = np.asarray(reference), np.asarray(output)
        self.count += 1
        if y.dtype.kind not in "fiub" or z.dtype.kind not in "fiub" or y.shape != z.shape:
            self._numbers = False
            self._entries, self._differ = self._entries + 1, self._differ + (not np.array_equal(y, z))
            return
        self._classes = self._classes and y.dtype.kind == "f" and looks_like_classes(self.name, y)
        if self._classes:
            self._ranked.append(agreement(y, z))
        self._add_numbers(y.astype(np.float64).ravel(), z.astype(np.float64).ravel())

    def _add_numbers(self, y: Array, z: Array) -> None:
        known = np.isfinite(y)
        y, z = y[known], z[known]
        if not y.size:
            return
        gap, size = np.abs(y - z), np.abs(y)
        self._entries, self._differ = self._entries + y.size, self._differ + int(np.count_nonzero(gap))
        self._abs, self._peak = max(self._abs, _largest(gap)), max(self._peak, float(size.max()))
        with np.errstate(divide="ignore", invalid="ignore"):
            self._rel = max(self._rel, _largest(np.where(gap == 0, 0.0, gap / size)))
        error, power = float(gap @ gap), float(y @ y)
        self._error, self._yy = self._error + error, self._yy + power
        self._zz, self._yz = self._zz + float(z @ z), self._yz + float(y @ z)
        loss = error / power if power else (0.0 if not error else math.inf)
        loss = math.inf if math.isnan(loss) else loss
        if loss > self._worst[1]:
            self._worst = (self.count - 1, loss)

    def row(self) -> dict[str, Any]:
        """The figures, null where they do not exist or are infinite (docs/json.md)."""
        found: dict[str, Any] = {"output": self.name, "samples": self.count}
        if self._numbers:
            norms = math.sqrt(self._yy * self._zz) if self._yy * self._zz > 0 else 0.0
            found["tolerance_abs"] = self._abs
            found["tolerance_rel"] = self._rel
            found["tolerance_of_peak"] = self._abs / self._peak if self._peak else None
            found["cosine"] = min(self._yz / norms, 1.0) if norms else None
            found["sqnr_db"] = 10 * math.log10(self._yy / self._error) if self._error and self._yy else None
            found["worst_sample"], found["worst_loss"] = self._worst if self._worst[0] >= 0 else (None, None)
        found["differing"] = self._differ / self._entries if self._entries else 0.0
        if self._classes and self._ranked and self._numbers:
            positions, first, five = np.sum(self._ranked, axis=0)
            found["top1"] = float(first / positions)
            if five >= 0:
                found["top5"] = float(five / positions)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}


def _largest(values: Array) -> float:
    """Maximum; infinite where there is a NaN."""
    top = float(values.max())
    return math.inf if math.isnan(top) else top


def looks_like_classes(name: str, y: Array) -> bool:
    """Whether the last axis seems to hold the scores of classes, so that their order is the answer.

    Probabilities do (rows that sum to one), outputs that are called so, and plain rows of a batch unless they are
    vectors of length one, as embeddings are.
    """
    if y.ndim < 2 or y.shape[-1] < 2 or not y.size or not np.isfinite(y).all():
        return False
    rows = y.reshape(-1, y.shape[-1]).astype(np.float64)
    if (rows >= 0).all() and np.allclose(rows.sum(axis=1), 1.0, atol=1e-3):
        return True
    if _CLASS_NAMES.search(name):
        return y.ndim <= 3
    unit = np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-3)
    return y.ndim == 2 and not unit and y.shape[-1] <= _MOST_CLASSES_ALONE


def agreement(y: Array, z: Array) -> tuple[int, int, int]:
    """Positions, those with the same largest class, those whose largest class is among the other's five largest.

    The last is negative where there are five classes or fewer.
    """
    classes = y.shape[-1]
    rows, others = y.reshape(-1, classes), z.reshape(-1, classes)
    wanted = rows.argmax(axis=1)
    same = int(np.count_nonzero(wanted == others.argmax(axis=1)))
    if classes <= 5:
        return len(rows), same, -1
    five = np.argpartition(-others, 4, axis=1)[:, :5]
    return len(rows), same, int(np.count_nonzero((five == wanted[:, None]).any(axis=1)))


def distances(
    references: Iterable[tuple[Feed, Sequence[Any]]], names: Sequence[str], session: Session, *, seconds: float
) -> list[dict[str, Any]]:
    """A row for each output of another model against the original's outputs on the same samples.

    Args:
        references: samples with the original's outputs, in the order of `names`.
        seconds: no sample is begun after so much time; at least one is.

    Raises:
        ModelError: the model fails on a sample.
    """
    found = [OutputDistance(name) for name in names]
    end = time.perf_counter() + seconds
    for sample, reference in references:
        for one, y, other in zip(found, reference, session.run(sample, names), strict=True):
            one.add(y, other)
        if time.perf_counter() > end:
            break
    return [one.row() for one in found]
