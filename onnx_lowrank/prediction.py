"""What a plan is worth on a machine that is not here: predicted from its table, never measured."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from onnx_lowrank.allocate import predicted_ms
from onnx_lowrank.plan import Decision
from onnx_lowrank.run import Run


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A predicted ratio, and whether it is that of the whole model or of its sites alone."""

    ratio: float
    whole: bool


def whole_key(run: Run) -> str:
    """Key of the original's own time in a table."""
    return f"whole {hashlib.sha256(situation(run).encode()).hexdigest()[:16]}"


def situation(run: Run) -> str:
    """What the time of a whole model depends on: its bytes, the shapes of its inputs, and what of it runs.

    Branches and numbers of runs may follow from the values of inputs.
    """
    shapes = [{name: list(array.shape) for name, array in feed.items()} for feed in run.loaded.feeds]
    taken = run.loaded.opening.taken
    return f"{run.loaded.file.sha256} {shapes}{f' {taken}' if taken else ''}"


def predicted(run: Run, decisions: Sequence[Decision]) -> Prediction:
    """The speed-up of a plan from the times of its sites.

    Where the table knows the time of the whole original at these shapes (`analyze` and `optimize` note it), what the
    sites save is taken from that; else the ratio is that of the sites that were timed, and the rest of the model
    makes the true one smaller.
    """
    saved = predicted_ms(decisions)
    known = run.table.known(whole_key(run)).get("ms")
    before = known if known else sum(d.ms_before or 0.0 for d in decisions)
    return Prediction(before / (before - saved) if 0 < saved < before else 1.0, bool(known))
