"""Which branches of a model its samples always take."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx

from onnx_lowrank.branches import Opening, candidates, result
from onnx_lowrank.constants import Constants
from onnx_lowrank.errors import ModelError
from onnx_lowrank.runtime import Feed, Session, with_outputs

_DEPTH = 8  # branches inside branches
_MOST = 64  # branches: each costs a copy of the graph


Sources = Sequence[Iterable[Feed]]
"""Samples from several places; each may be gone through several times."""


def always_taken(model: onnx.ModelProto, folder: Path, sources: Sources, provider: str) -> Opening:
    """The model with every branch opened that all samples take, from the outside in.

    Args:
        folder: where external data lies.
        sources: all that the model will be run on.
    """
    opening = Opening.none(model)
    for _ in range(_DEPTH):
        found = candidates(opening.flat)
        if not found:
            break
        known = _conditions(opening.flat, folder, {node.input[0] for node in found}, sources, provider)
        further = opening
        for node in found:
            values = known.get(node.input[0], set())
            if len(values) == 1 and len(further.steps) < _MOST:
                further = further.further((result(node), next(iter(values))))
        if further is opening or not _runs(further.flat, folder, sources, provider):
            break
        opening = further
    return opening


def _conditions(
    model: onnx.ModelProto, folder: Path, names: set[str], sources: Sources, provider: str
) -> dict[str, set[bool]]:
    """The values of some conditions over all samples."""
    constants = Constants(model, folder)
    found: dict[str, set[bool]] = {name: set() for name in names}
    for name in names:
        if (value := constants.fixed(name)) is not None:
            found[name].add(bool(np.all(value)))
    computed = sorted(name for name in names if not found[name] and name not in {i.name for i in model.graph.input})
    session = Session(with_outputs(model, computed), provider=provider, threads=0, folder=folder) if computed else None
    for sample in itertools.chain.from_iterable(sources):
        if all(len(values) > 1 for values in found.values()):
            break
        given = {name: sample[name] for name in names.intersection(sample)}
        if session is not None:
            given |= dict(zip(computed, session.run(sample, computed), strict=True))
        for name, value in given.items():
            found[name].add(bool(np.all(value)))
    return found


def _runs(model: onnx.ModelProto, folder: Path, sources: Sources, provider: str) -> bool:
    """Whether the runtime takes an opened model: an old operator set has no Identity of a sequence."""
    try:
        Session(model, provider=provider, threads=0, folder=folder).run(next(itertools.chain.from_iterable(sources)))
    except ModelError:
        return False
    return True
