"""The main job on zoo models, as a user would run it: figures for docs/benchmarks.

python tools/bench_main_job.py ZOO_FOLDER OUT.json [--synthetic] [NAME …] [-- OPTION …]

ZOO_FOLDER holds NAME.onnx and NAME.npz (`onnx-lowrank zoo get NAME`, `tools/zoo_build.py`). Every model goes through
`optimize` in a process of its own, with an empty latency cache, one thread, CPU provider, max loss 0.01; the peak
memory is that process's. `--synthetic` gives them no data; options after `--` are passed on. The rewritten models are
left beside OUT.json's folder in `optimized/`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_optimize import optimized, split_options


def optimize(model: Path, out: Path, options: list[str]) -> dict[str, Any]:
    """One run of the command line; its JSON, with seconds and peak memory in megabytes."""
    with tempfile.TemporaryDirectory() as cache:
        report, spent = optimized(model, ["-o", str(out), *options, "--cache", cache])
    if report is None:
        return {"model": model.stem, **spent}
    timed = report["latency"][0] if report["latency"] else {}
    return {
        "model": model.stem,
        "status": report["status"],
        "verdict": report["verdict"],
        "aa_ratio_ci": timed.get("aa_ratio_ci"),
        "additivity": report["additivity"],
        "default_threads_ratio": report["latency"][1]["ratio"] if len(report["latency"]) > 1 else None,
        "before": {k: report["model"]["before"][k] for k in ("bytes", "parameters", "macs")},
        "after": {k: report["model"]["after"][k] for k in ("bytes", "parameters", "macs")},
        **spent,
        "environment": report["environment"],
    }


def main() -> None:
    """Run the models that are there, write the JSON after each."""
    folder, target, rest = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    asked, options = split_options(rest)
    names = [word for word in asked if word != "--synthetic"]
    outs = target.parent / "optimized"
    outs.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = json.loads(target.read_text()) if target.exists() else []
    for model in sorted(folder.glob("*.onnx")):
        data = model.with_suffix(".npz")
        if (names and model.stem not in names) or not data.exists():
            continue
        given = [] if "--synthetic" in asked else ["--data", str(data)]
        row = optimize(model, outs / model.name, [*given, *options])
        rows = [*(r for r in rows if r["model"] != row["model"]), row]
        target.write_text(json.dumps(rows, indent=1) + "\n")
        verdict = row.get("verdict", {})
        print(model.stem, row.get("status", row.get("error")), verdict.get("speedup"), verdict.get("loss"), flush=True)


if __name__ == "__main__":
    main()
