"""Which branches of a model its samples always take, and how often they all run the bodies of its loops."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from onnx_lowrank.borders import Taken, result
from onnx_lowrank.branches import Opening, candidates
from onnx_lowrank.constants import Constants
from onnx_lowrank.errors import ModelError
from onnx_lowrank.loops import counted, is_small
from onnx_lowrank.runtime import Feed, Session, with_outputs

_DEPTH = 8  # bodies inside bodies
_MOST = 64  # bodies: each costs a copy of the graph


Sources = Sequence[Iterable[Feed]]
"""Samples from several places; each may be gone through several times."""


def agreed_by_all(model: onnx.ModelProto, folder: Path, sources: Sources, provider: str) -> Opening:
    """The model with every branch opened that all samples take, and every loop that they run equally often.

    From the outside in; what the runtime does not take opened stays closed.

    Args:
        folder: where external data lies.
        sources: all that the model will be run on.
    """
    opening = Opening.none(model)
    for _ in range(_DEPTH):
        wanted = _agreed(opening.flat, folder, sources, provider)
        further = _further(opening, wanted)
        if further is not opening and not _runs(further.flat, folder, sources, provider):
            further = opening
            for taken in wanted:
                one = _further(further, [taken])
                further = one if one is further or _runs(one.flat, folder, sources, provider) else further
        if further is opening:
            break
        opening = further
    return opening


def _further(opening: Opening, wanted: Iterable[Taken]) -> Opening:
    for taken in wanted:
        opening = opening.further(taken) if len(opening.steps) < _MOST else opening
    return opening


def _agreed(model: onnx.ModelProto, folder: Path, sources: Sources, provider: str) -> list[Taken]:
    """What is the same for all samples, of every If, Loop and Scan that may be opened, in the order of the graph."""
    found = candidates(model)
    branches = [node for node in found if node.op_type == "If"]
    known = _conditions(model, folder, {node.input[0] for node in branches}, sources, provider) if branches else {}
    values = {result(node): known[node.input[0]] for node in branches}
    loops = [node for node in found if node.op_type != "If"]
    if loops:
        values |= _counts(model, folder, loops, sources, provider)
    agreed = ((node, values.get(result(node), set())) for node in found)
    once = ((node, next(iter(seen))) for node, seen in agreed if len(seen) == 1)
    return [(result(node), value) for node, value in once if node.op_type == "If" or is_small(node, value)]


def _conditions(
    model: onnx.ModelProto, folder: Path, names: set[str], sources: Sources, provider: str
) -> dict[str, set[int]]:
    """The values of some conditions over all samples."""
    constants = Constants(model, folder)
    found: dict[str, set[int]] = {name: set() for name in names}
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


def _counts(
    model: onnx.ModelProto, folder: Path, loops: Sequence[onnx.NodeProto], sources: Sources, provider: str
) -> Mapping[str, set[int]]:
    """How often the body of each Loop and Scan, by its first output, runs over all samples.

    Counted, not read from trip counts and conditions: nothing needs to be known of what a body does with them.
    """
    longer, names = counted(model, loops)
    found: dict[str, set[int]] = {name: set() for name in names}
    try:
        session = Session(with_outputs(longer, [*names.values()]), provider=provider, threads=0, folder=folder)
        for sample in itertools.chain.from_iterable(sources):
            if all(len(values) > 1 for values in found.values()):
                break
            for name, value in zip(names, session.run(sample, [*names.values()]), strict=True):
                found[name].add(len(value))
    except ModelError:  # a body that takes no further output stays closed; the others are counted without it
        alone = [_counts(model, folder, [node], sources, provider) for node in loops] if len(loops) > 1 else []
        return {name: values for one in alone for name, values in one.items()}
    return found


def _runs(model: onnx.ModelProto, folder: Path, sources: Sources, provider: str) -> bool:
    """Whether the runtime takes an opened model: an old operator set has no Identity of a sequence."""
    try:
        Session(model, provider=provider, threads=0, folder=folder).run(next(itertools.chain.from_iterable(sources)))
    except ModelError:
        return False
    return True
