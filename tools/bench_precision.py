"""Low rank and int8 together on zoo models: figures for docs/benchmarks/precision.json.

python tools/bench_precision.py ZOO_FOLDER OUT.json NAME:MAX_LOSS [NAME:MAX_LOSS …] [-- OPTION …]

ZOO_FOLDER holds NAME.onnx and NAME.npz. Every model goes through `optimize --precision int8` in a process of its own,
one thread, CPU provider; options after `--` are passed on. The models are left in `optimized/` beside OUT.json:
NAME-int8.onnx and, in float32, NAME-lowrank.onnx.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def optimize(model: Path, limit: str, outs: Path, options: list[str]) -> dict[str, Any]:
    """One run of the command line: the four columns, the ways to int8, seconds by stage, peak memory in megabytes."""
    command = [sys.executable, "-m", "onnx_lowrank", "optimize", str(model), "--data", str(model.with_suffix(".npz"))]
    command += ["-o", str(outs / f"{model.stem}-int8.onnx"), "--keep-fp32", str(outs / f"{model.stem}-lowrank.onnx")]
    command += ["--precision", "int8", "--max-loss", limit, "--json", *options]
    since = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        answer, errors = Path(scratch, "report.json"), Path(scratch, "errors")
        with answer.open("w") as stdout, errors.open("w") as stderr:
            child = subprocess.Popen(command, stdout=stdout, stderr=stderr)
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            return {"model": model.stem, "exit": child.returncode, "error": errors.read_text().strip()[-300:]}
        report = json.loads(answer.read_text())
    return {
        "model": model.stem,
        "max_loss": float(limit),
        "options": options,
        **{key: report[key] for key in ("status", "verdict", "precisions", "ways", "environment")},
        "chosen": [{k: s[k] for k in ("node", "kind", "rank", "reason")} for s in report["sites"]],
        "seconds": round(time.perf_counter() - since, 1),
        "stages": report["seconds"],
        "peak_megabytes": round(usage.ru_maxrss * 1024 / 1e6),
    }


def main() -> None:
    """Run the models that are named, write the JSON after each."""
    folder, target, *rest = sys.argv[1:]
    cut = rest.index("--") if "--" in rest else len(rest)
    asked, options, out = rest[:cut], rest[cut + 1 :], Path(target)
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
