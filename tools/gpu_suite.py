"""Everything that is to be measured on a card, in one command; it can be stopped and goes on where it was.

python tools/gpu_suite.py --out DIR [--part PART|all] [--seconds 520] [--zoo FOLDER]

Each part writes DIR/PART.json after every item and skips the items that are there; an item that failed with an error
stays there too, until `--retry`. A provider that does not load ends the suite at once (exit code 2). No item is begun
that would probably outlast the seconds. The measured tables lie in DIR/tables and, ready for `--cache FILE` elsewhere,
in DIR/table-*.json (docs/tables.md).
FOLDER holds NAME.onnx and NAME.npz of craft, vgg16, minilm, efficientnet, smollm: those that are there are measured.

`--provider cpu --dry-run` takes tiny models and shapes, to see on any machine that the suite runs. Nothing here reads
the network; docs/gpu.md says what an offline machine needs.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_latency
import gpu_parts
from gpu_parts import Suite

from onnx_lowrank.errors import LowRankError
from onnx_lowrank.hardware import card
from onnx_lowrank.latency import read_table, write_table
from onnx_lowrank.providers import Provider, parse_options
from onnx_lowrank.report import environment

PARTS: dict[str, Callable[[Suite], Iterator[tuple[str, Callable[[], Any]]]]] = {
    "providers": gpu_parts.providers,
    "correctness": gpu_parts.correctness,
    "staircases": gpu_parts.staircases,
    "latency": gpu_latency.latency,
    "precisions": gpu_latency.precisions,
}
FIRST_GUESS = {"providers": 15.0, "correctness": 15.0, "staircases": 10.0, "latency": 60.0, "precisions": 120.0}
"""Seconds of an item on a card before one was seen."""


def run_part(suite: Suite, name: str, out: Path, end: float, *, retry: bool) -> bool:
    """Measure the items that the part's file lacks; whether all are there now."""
    path = out / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {"items": {}, "seconds": {}}
    if retry:
        found["items"] = {item: result for item, result in found["items"].items() if "error" not in result}
    whole = True
    for item, measure in PARTS[name](suite):
        if item in found["items"]:
            continue
        seconds = found["seconds"].values()
        expected = max([*seconds, 0.1 if suite.dry else FIRST_GUESS[name]]) if seconds else FIRST_GUESS[name]
        if time.monotonic() + (0 if suite.dry else expected) > end:
            whole = False
            continue
        since = time.monotonic()
        found["items"][item] = attempt(measure)
        found["seconds"][item] = round(time.monotonic() - since, 1)
        found["environment"] = environment() | card(suite.provider)
        found["provider"] = {"name": suite.provider, "options": suite.provider.options}
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {item}: {found['seconds'][item]} s {found['items'][item].get('error', '')}", flush=True)
    return whole


def attempt(measure: Callable[[], Any]) -> Any:
    """The result, or the error as one line: the other items are measured all the same."""
    try:
        return measure()
    except LowRankError as fault:
        return {"error": str(fault)}
    except Exception as fault:  # a fault of one item must not cost the others their time on the card
        where = traceback.extract_tb(fault.__traceback__)[-1]
        return {"error": f"{type(fault).__name__}: {fault} ({Path(where.filename).name}:{where.lineno})"}


def export_tables(out: Path) -> None:
    """Copies of the measured tables under names that say what they are of."""
    for path in sorted((out / "tables").glob("latency-*.json")):
        settings, rows = read_table(path)
        options = "".join(f"-{k}-{v}" for k, v in sorted(settings.get("provider_options", {}).items()))
        precision = f"-{settings['precision'].replace(' ', '-')}" if settings.get("precision") else ""
        write_table(out / f"table-{settings['provider']}{options}{precision}.json", settings, rows)


def main() -> int:
    """Run the parts; 0 when all their items are measured, 2 without the provider, 3 when the seconds did not reach."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--provider-option", action="append", default=[])
    parser.add_argument("--seconds", type=float, default=520.0)
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--retry", action="store_true", help="try items again that failed with an error")
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    (given.out / "tables").mkdir(parents=True, exist_ok=True)
    provider = Provider(given.provider, parse_options(given.provider_option), folder=given.out / "tensorrt")
    suite = Suite(provider, given.out, given.zoo, given.dry_run)
    try:
        gpu_parts.opens(suite)
    except LowRankError as fault:
        print(f"error: {fault}")
        return 2
    parts = [name for name in PARTS if given.part in (name, "all")]
    done = {name: run_part(suite, name, given.out, end, retry=given.retry) for name in parts}
    export_tables(given.out)
    left = [name for name, whole in done.items() if not whole]
    print(f"not finished: {', '.join(left)}; run the same command again" if left else "all parts are measured")
    return 3 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
