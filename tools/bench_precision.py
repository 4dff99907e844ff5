"""Low rank and int8 together on zoo models: figures for docs/benchmarks/precision.json.

python tools/bench_precision.py ZOO_FOLDER OUT.json NAME:MAX_LOSS [NAME:MAX_LOSS …] [-- OPTION …]

ZOO_FOLDER holds NAME.onnx and NAME.npz. Every model goes through `optimize --precision int8` in a process of its own,
one thread, CPU provider; options after `--` are passed on. The models are left in `optimized/` beside OUT.json:
NAME-int8.onnx and, in float32, NAME-lowrank.onnx.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench_optimize import optimized, split_options


def optimize(model: Path, limit: str, outs: Path, options: list[str]) -> dict[str, Any]:
    """One run of the command line: the four columns, the ways to int8, seconds by stage, peak memory in megabytes."""
    made = ["-o", str(outs / f"{model.stem}-int8.onnx"), "--keep-fp32", str(outs / f"{model.stem}-lowrank.onnx")]
    asked = ["--data", str(model.with_suffix(".npz")), "--precision", "int8", "--max-loss", limit, *options]
    report, spent = optimized(model, [*made, *asked])
    if report is None:
        return {"model": model.stem, **spent}
    return {
        "model": model.stem,
        "max_loss": float(limit),
        "options": options,
        **{key: report[key] for key in ("status", "verdict", "precisions", "ways", "environment")},
        "chosen": [{k: s[k] for k in ("node", "kind", "rank", "reason")} for s in report["sites"]],
        **spent,
    }


def main() -> None:
    """Run the models that are named, write the JSON after each."""
    folder, target, *rest = sys.argv[1:]
    (asked, options), out = split_options(rest), Path(target)
    outs = out.parent / "optimized"
    outs.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    for name, _, limit in (text.partition(":") for text in asked):
        row = optimize(Path(folder, f"{name}.onnx"), limit or "0.01", outs, options)
        rows = [*(r for r in rows if r["model"] != row["model"]), row]
        out.write_text(json.dumps(rows, indent=1) + "\n")
        print(name, row.get("status", row.get("error")), row.get("seconds"), flush=True)
        for column in row.get("precisions", ()):
            print("  ", column["name"], column["p50_ms"], column["ratio"], column["over_precision"], column["loss"])


if __name__ == "__main__":
    main()
