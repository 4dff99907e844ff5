"""How far the outputs of a rewritten model are from the original's, on samples that nothing was fitted to."""

from __future__ import annotations

import copy
import hashlib
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import scipy.special

from onnx_lowrank.runtime import Feed, Session


class Loss(Protocol):
    """Counts samples and gives one number: 0 when the outputs are the same, larger is worse."""

    per_sample: list[float]
    """Loss of each sample alone."""

    def add(self, reference: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Count one sample: the original's outputs and the other model's, in the same order."""

    def value(self) -> float:
        """The loss over all samples so far; 0 when there are none."""

    def error(self) -> float:
        """Standard error of `value()` over samples like these; infinite when there are fewer than two."""


def upper_end(loss: Loss, confidence: float) -> float:
    """Upper end of the one-sided interval of a loss over samples like those that were counted.

    Args:
        confidence: from 0.5, which is the measured loss itself, to below 1. By Student's t, whose tails are too light
            where few samples carry most of the loss: more samples are the better cure.
    """
    if confidence == 0.5 or not math.isfinite(loss.value()):
        return loss.value()
    quantile = float(scipy.special.stdtrit(max(len(loss.per_sample) - 1, 1), confidence))
    return loss.value() + quantile * loss.error()


NewLoss = Callable[[Sequence[str]], Loss]
"""Makes a counter for outputs of these names."""


class References:
    """Outputs of the original model on the held-out samples, kept on disk so that memory does not grow.

    `fingerprint` is a hash of the samples: names, types, shapes and values of all inputs in their order.
    """

    def __init__(self, session: Session, samples: Iterable[Feed], new_loss: NewLoss) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="onnx-lowrank-")
        self._samples, self._new_loss = samples, new_loss
        self._kept: Callable[[Feed], bool] = lambda _: True
        self.outputs = session.output_names
        self.count = 0
        counted = hashlib.sha256()
        for sample in samples:
            _count(counted, sample)
            outputs = session.run(sample)
            np.savez(self._path(self.count), *[np.asarray(y) for y in outputs])
            self.count += 1
        self.fingerprint = counted.hexdigest()

    def _path(self, index: int) -> Path:
        return Path(self._folder.name) / f"{index}.npz"

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
        counted = self._new_loss(self.outputs)
        for sample, reference in self:
            counted.add(reference, session.run({**sample, **(more or {})}, self.outputs))
        return counted


def _count(hashed: Any, sample: Feed) -> None:
    """Take a sample into a hash."""
    for name, value in sorted(sample.items()):
        array = np.asarray(value)
        hashed.update(f"{name} {array.dtype} {array.shape} ".encode())
        hashed.update(repr(array.tolist()).encode() if array.dtype.kind in "OUS" else array.tobytes())
