"""How far the outputs of a rewritten model are from the original's, on samples that nothing was fitted to."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import scipy.special

from onnx_lowrank.runtime import Feed, Session
from onnx_lowrank.scratch import Folder

_SYMMETRIC = 1e-6  # skewness over the root of the samples: below it the two intervals agree, and rounding would not


class Loss(Protocol):
    """Counts samples and gives one number: 0 when the outputs are the same, larger is worse."""

    per_sample: list[float]
    """Loss of each sample alone."""

    def add(self, reference: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Count one sample: the original's outputs and the other model's, in the same order."""

    def value(self) -> float:
        """The loss over all samples so far; 0 when there are none."""

    def influences(self) -> Sequence[float]:
        """How far each sample moves `value()`, linearised: they sum to zero; not called where it is infinite."""


def standard_error(loss: Loss) -> float:
    """Standard error of a loss over samples like those that were counted; infinite when there are fewer than two."""
    count = len(loss.per_sample)
    if count < 2 or not math.isfinite(loss.value()):
        return math.inf
    return math.sqrt(count / (count - 1) * float(np.sum(np.square(loss.influences()))))


def upper_end(loss: Loss, confidence: float) -> float:
    """Upper end of the one-sided interval of a loss over samples like those that were counted.

    Student's interval, and where few samples carry most of the loss the one that Hall's cubic transformation makes of
    it ("On the removal of skewness by transformation", J. R. Statist. Soc. B 54, 1992): the mean of so few is skewed.

    Args:
        confidence: from 0.5, which is the measured loss itself, to below 1.
    """
    if confidence == 0.5:
        return loss.value()
    error = standard_error(loss)
    if error == 0 or not math.isfinite(error):
        return loss.value() + error
    moved = np.asarray(loss.influences())
    quantile = float(scipy.special.stdtrit(len(moved) - 1, confidence))
    skewness = float(np.mean((moved / np.sqrt(np.mean(moved**2))) ** 3))
    tail = skewness / math.sqrt(len(moved))
    if tail <= _SYMMETRIC:
        return loss.value() + quantile * error
    transformed = 3 / tail * (1 - float(np.cbrt(1 - tail * (quantile + tail / 6))))
    return loss.value() + transformed * error


NewLoss = Callable[[Sequence[str]], Loss]
"""Makes a counter for outputs of these names."""


class References:
    """Outputs of the original model on some samples, kept on disk so that memory does not grow.

    `fingerprint` is a hash of the samples: names, types, shapes and values of all inputs in their order. `bytes` is
    what the outputs take on disk.
    """

    def __init__(self, session: Session, samples: Iterable[Feed], new_loss: NewLoss) -> None:
        self._folder = Folder()
        self._samples, self.new_loss = samples, new_loss
        self._kept: Callable[[Feed], bool] = lambda _: True
        self.outputs = session.output_names
        self.count = self.bytes = 0
        counted = hashlib.sha256()
        for sample in samples:
            _count(counted, sample)
            outputs = session.run(sample)
            np.savez(self._path(self.count), *[np.asarray(y) for y in outputs])
            self.bytes += self._path(self.count).stat().st_size
            self.count += 1
        self.fingerprint = counted.hexdigest()

    def _path(self, index: int) -> Path:
        return self._folder.path / f"{index}.npz"

    def __iter__(self) -> Iterator[tuple[Feed, list[Any]]]:
        for index, sample in enumerate(self._samples):
            if not self._kept(sample):
                continue
            with np.load(self._path(index), allow_pickle=True) as stored:  # our own file; strings are objects
                yield sample, [stored[name] for name in stored.files]

    def only(self, keep: Callable[[Feed], bool]) -> References:
        """The same without the samples that `keep` is false for; `count` and `fingerprint` are still those of all."""
        view = copy.copy(self)
        view._kept = keep
        return view

    def loss(self, session: Session, more: Feed | None = None) -> Loss:
        """Loss of another model on the same samples; outputs are matched by name.

        Args:
            more: tensors that are fed beside every sample.
        """
        counted = self.new_loss(self.outputs)
        for sample, reference in self:
            counted.add(reference, session.run({**sample, **(more or {})}, self.outputs))
        return counted


def _count(hashed: Any, sample: Feed) -> None:
    """Take a sample into a hash."""
    for name, value in sorted(sample.items()):
        array = np.asarray(value)
        hashed.update(f"{name} {array.dtype} {array.shape} ".encode())
        hashed.update(repr(array.tolist()).encode() if array.dtype.kind in "OUS" else array.tobytes())
