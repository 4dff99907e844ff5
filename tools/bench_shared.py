"""What a common first factor is worth: the loss at equal time with and without it, figures for decision 065.

python tools/bench_shared.py MODEL.onnx SAMPLES.npz …

Only sites that read a tensor together are rewritten. At each share of their measured time the plan with the least
estimated loss is taken of `svd` and `pivot` alone, and of these and `shared`; built, and its loss measured on held-out
samples.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from onnx_lowrank.allocate import Choices
from onnx_lowrank.families import families
from onnx_lowrank.knapsack import settle
from onnx_lowrank.passes.shared import SHARED
from onnx_lowrank.planning import choose
from onnx_lowrank.run import Clock, Run, start
from onnx_lowrank.settings import Settings

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)


def of_families(run: Run, choices: Sequence[Choices], kinds: Sequence[str]) -> list[Choices]:
    """The choices of the sites in families, with the candidates of some kinds."""
    names = {site.name for family in families(run.loaded.sites) for site in family}
    return [
        dataclasses.replace(c, candidates=tuple(k for k in c.candidates if k.kind in kinds))
        for c in choices
        if c.dense.node in names
    ]


def main() -> None:
    """Print a line for each share."""
    settings = Settings(kinds=("svd", "pivot", SHARED), max_loss=0.5)
    run = start(Path(sys.argv[1]), sys.argv[2:], settings, Clock(lambda *_: None))
    found = choose(run)
    total = sum(c.cost("ms") for c in of_families(run, found, ()))
    print("share of the time: loss without, with a common factor; sites that have it")
    for share in SHARES:
        line = []
        for kinds in (("svd", "pivot"), ("svd", "pivot", SHARED)):
            plan = settle(of_families(run, found, kinds), least="loss", limited="ms", limit=share * total)
            line.append((run.loss_of(plan), sum(d.kind == SHARED for d in plan)) if plan else (float("nan"), 0))
        print(f"{share:g}: {line[0][0]:.5f}, {line[1][0]:.5f}; {line[1][1]}", flush=True)


if __name__ == "__main__":
    main()
