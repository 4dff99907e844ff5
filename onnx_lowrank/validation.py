"""How far the outputs of a rewritten model are from the original's, on samples that nothing was fitted to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.runtime import Feed, Session


class RelativeLoss:
    """Relative squared error `Σ‖y − ŷ‖² / Σ‖y‖²`, per output, averaged over the outputs.

    Outputs that are not floating point count the share of entries that differ. A result that is not finite
    where the original is, or of another shape, is an infinite loss.
    """

    def __init__(self) -> None:
        self._error: dict[int, float] = {}
        self._power: dict[int, float] = {}
        self.per_sample: list[float] = []

    def add(self, reference: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Count one sample."""
        worst = 0.0
        for index, (y, other) in enumerate(zip(reference, outputs, strict=True)):
            error, power = _difference(np.asarray(y), np.asarray(other))
            self._error[index] = self._error.get(index, 0.0) + error
            self._power[index] = self._power.get(index, 0.0) + power
            worst = max(worst, _ratio(error, power))
        self.per_sample.append(worst)

    def value(self) -> float:
        """The loss over all samples so far; 0 when there are none."""
        ratios = [_ratio(self._error[i], self._power[i]) for i in self._error]
        return float(np.mean(ratios)) if ratios else 0.0


def _ratio(error: float, power: float) -> float:
    if error == 0:
        return 0.0
    return error / power if power > 0 else float("inf")


def _difference(y: npt.NDArray[Any], other: npt.NDArray[Any]) -> tuple[float, float]:
    if y.shape != other.shape:
        return float("inf"), 1.0
    if y.dtype.kind != "f":
        return float(np.sum(y != other)), float(max(y.size, 1))
    finite = np.isfinite(y)
    wide, wide_other = y.astype(np.float64)[finite], other.astype(np.float64)[finite]
    error = float(np.sum((wide - wide_other) ** 2))
    return (error if np.isfinite(error) else float("inf")), float(np.sum(wide**2))


class References:
    """Outputs of the original model on the held-out samples, kept on disk so that memory does not grow."""

    def __init__(self, session: Session, samples: Iterable[Feed]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="onnx-lowrank-")
        self._samples = samples
        self.outputs = session.output_names
        self.count = 0
        for sample in samples:
            outputs = session.run(sample)
            np.savez(self._path(self.count), *[np.asarray(y) for y in outputs])
            self.count += 1

    def _path(self, index: int) -> Path:
        return Path(self._folder.name) / f"{index}.npz"

    def __iter__(self) -> Iterator[tuple[Feed, list[Any]]]:
        for index, sample in enumerate(self._samples):
            with np.load(self._path(index), allow_pickle=True) as stored:  # our own file; strings are objects
                yield sample, [stored[name] for name in stored.files]

    def loss(self, session: Session) -> RelativeLoss:
        """Loss of another model on the same samples; outputs are matched by name."""
        counted = RelativeLoss()
        for sample, reference in self:
            counted.add(reference, session.run(sample, self.outputs))
        return counted
