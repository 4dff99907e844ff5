"""Fuzz onnx-lowrank: random graphs through the rewriting, broken files through the loader and the command line.

    tools/fuzz.py graphs --cases 2000 --seed 0          # every tenth through optimize
    tools/fuzz.py files --cases 10000 --seed 0 zoo/*.onnx
    tools/fuzz.py graphs --only 1234                    # one case again

Prints the counts, and a line for each failure; exit code 1 when there is one.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import fuzz_files
import fuzz_graphs
import fuzz_models
import onnx
from onnx.external_data_helper import convert_model_to_external_data

Case = Callable[[int], str]


def graph_case(seed: int, every: int) -> str:
    """One random graph; every so many go through the whole journey."""
    return fuzz_graphs.check(seed, pipeline=bool(every) and seed % every == 0)


def file_case(seed: int, every: int, bases: list[Path], scratch: Path) -> str:
    """One broken file: its bytes, its fields or its data file; every so many through the command line."""
    rng = random.Random(seed)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    path, data = folder / "modèl.onnx", folder / "data"
    if bases and rng.random() < 0.3:
        content = rng.choice(bases).read_bytes()
    else:
        model, _ = fuzz_models.make(rng.randrange(10_000))
        external = rng.random() < 0.5
        if external:
            convert_model_to_external_data(model, location="data", size_threshold=8)
            onnx.save(model, path)
            if data.is_file() and rng.random() < 0.3:
                data.write_bytes(fuzz_files.mutated(data.read_bytes(), rng))
        content = path.read_bytes() if external else model.SerializeToString()
    path.write_bytes(fuzz_files.broken(content, rng))
    outcome = fuzz_files.load(path, folder)
    if every and seed % every == 0:
        outcome = fuzz_files.command(path, ["--cache", str(scratch / "cache"), "--samples", "4"])
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return outcome


def run(case: Case, seeds: range, quiet: bool) -> tuple[collections.Counter[str], list[str]]:
    """Counts by outcome, and the failures."""
    counts: collections.Counter[str] = collections.Counter()
    failures = []
    for done, seed in enumerate(seeds):
        try:
            counts[case(seed)] += 1
        except Exception as fault:  # whatever it is, it is what is looked for
            where = " ".join(
                f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(fault.__traceback__)[-3:]
            )
            failures.append(f"seed {seed}: {type(fault).__name__}: {' '.join(str(fault).split())[:200]} ({where})")
            print(failures[-1], file=sys.stderr, flush=True)
        if not quiet and done % 100 == 99:
            print(f"{done + 1} of {len(seeds)}, {len(failures)} failures", file=sys.stderr, flush=True)
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["graphs", "files"])
    parser.add_argument("bases", nargs="*", type=Path, help="model files to break, beside generated ones")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next ones count up")
    parser.add_argument("--every", type=int, default=10, help="every so many go through optimize; 0: none")
    parser.add_argument("--only", type=int, help="just this seed, with its traceback")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("-q", "--quiet", action="store_true")
    given = parser.parse_intermixed_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        os.environ["ONNX_LOWRANK_CACHE"] = f"{scratch}/cache"

        def case(seed: int) -> str:
            if given.what == "graphs":
                return graph_case(seed, given.every)
            return file_case(seed, given.every, given.bases, Path(scratch))

        if given.only is not None:
            print(case(given.only))
            return 0
        counts, failures = run(case, range(given.seed, given.seed + given.cases), given.quiet)
    result = {
        "what": given.what, "bases": [path.name for path in given.bases],
        "cases": given.cases, "seed": given.seed, "every": given.every,
        "seconds": round(time.perf_counter() - began, 1), "outcomes": dict(counts.most_common()), "failures": failures,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
