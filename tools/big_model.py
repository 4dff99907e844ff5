"""A model of 2.8 GB with external data: analyse and optimise two of its sites; memory and seconds of each step.

    tools/big_model.py DIR --json docs/benchmarks/big-model.json
    tools/big_model.py DIR --layers 48 --heavy 100000000     the same layout, a ninth of the size
    tools/big_model.py DIR --steps rewrite planned --within 1.5     each in a memory control group of 1.5 GB (root)

The weights are random, spread over four data files with gaps before their offsets, one of them a symbolic link and one
a hard link into a store. Every step runs in a process of its own. Its memory is read a hundred times a second:
`anonymous` is what the process holds itself, `resident` counts the pages of mapped files too, which the system takes
back where memory is short. Both are the most that was seen, of each stage too. A control group (version 1 or 2) ends a
process that cannot do with what it allows, pages of files that it was the first to read included (`group_gb`); the
files are taken out of the system's cache before.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnx_lowrank import heft

FILES = 4
INCLUDED = ("block3/linear", "block20/linear")
PAGE = 65536


def save(folder: Path, width: int, layers: int) -> Path:
    """The model; weights are written a layer at a time."""
    path, store = folder / "big.onnx", folder / "store"
    store.mkdir(parents=True, exist_ok=True)
    rng, nodes, tensors, name = np.random.default_rng(0), [], [], "x"
    offsets = [PAGE] * FILES
    for i in range(layers):
        file = i % FILES
        low = rng.standard_normal((width, 64), np.float32) @ rng.standard_normal((64, width), np.float32)
        weight = low / np.float32(8 * width**0.5)
        with (store / f"part{file}").open("r+b" if offsets[file] > PAGE else "wb") as data:
            data.seek(offsets[file])
            data.write(weight.tobytes())
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", f"part{file}.bin"), ("offset", offsets[file]), ("length", weight.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        offsets[file] += weight.nbytes + PAGE
        tensors.append(tensor)
        nodes += [helper.make_node("MatMul", [name, f"w{i}"], [f"m{i}"], name=f"block{i}/linear"),
                  helper.make_node("Tanh", [f"m{i}"], [f"y{i}"])]  # fmt: skip
        name = f"y{i}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", width]) for n in ("x", name)]
    graph = helper.make_graph(nodes, "big", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    for file in range(FILES):
        target = folder / f"part{file}.bin"
        target.unlink(missing_ok=True)
        if file == 1:
            target.symlink_to(store / f"part{file}")
        else:
            target.hardlink_to(store / f"part{file}")
    return path


def rewrite(path: Path, out: Path) -> str:
    """Survey, factor two sites without data, write: all that needs no runtime."""
    from onnx_lowrank.files import read_model, write_model
    from onnx_lowrank.graph import Graph
    from onnx_lowrank.passes.survey import survey
    from onnx_lowrank.passes.svd import SVD
    from onnx_lowrank.rewrite import patch_of

    file = read_model(path)
    graph = Graph(file.model, file.folder)
    sites = survey(graph).sites
    assert len(sites) == sum(node.op_type == "MatMul" for node in file.model.graph.node)
    for site in sites:
        if site.name in INCLUDED:
            rng = np.random.default_rng(0)
            width = site.geometry.inputs
            basis = np.linalg.qr(site.weight @ rng.standard_normal((width, 96), np.float32))[0].astype(np.float64)
            fragment = SVD.build(site.geometry, basis, basis.T @ site.weight, site.bias_vector)
            graph.apply(patch_of(site, fragment, "svd"))
    return f"{write_model(graph.commit(), out, folder=file.folder, external=True)} bytes written"


def step(name: str, folder: Path, progress: Callable[[str, int, int], None]) -> str:
    """One step, in the process of its own; what came out of it, in a line."""
    import onnx_lowrank
    from onnx_lowrank import cache

    path, out = folder / "big.onnx", folder / "out"
    if name == "rewrite":
        return rewrite(path, out / "big.onnx")
    settings: dict[str, Any] = {
        "data": folder / "x.npz",
        "cache": folder / "cache",
        "kinds": ("svd",),
        "include": INCLUDED,
        "progress": progress,
    }
    if name == "analyze":
        return onnx_lowrank.analyze(path, **settings).verdict.reason
    if name == "planned":  # with the times of the steps before: nothing is timed
        cache.export(folder / "cache", folder / "table.json")
        settings |= {"cache": folder / "table.json", "verify_latency": False}
    return onnx_lowrank.optimize(path, out / "big-lr.onnx", **settings).verdict.reason


def memory(pid: int) -> dict[str, float]:
    """Gigabytes that a process has now; nothing when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "VmRSS"))}
    names = {"anonymous": "RssAnon", "resident": "VmRSS"}
    return {name: int(found[key]) * 1024 / 1e9 for name, key in names.items() if key in found}


def control_group(gigabytes: float) -> Path:
    """A control group whose processes may take so much memory together, pages of files included."""
    base = Path("/sys/fs/cgroup")
    old = (base / "memory").is_dir()
    group = (base / "memory" if old else base) / f"big-model-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(int(gigabytes * 1e9)))
    return group


def forget(folder: Path) -> None:
    """Take the files of a folder out of the system's cache, so that whoever reads them next is charged for them."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def most_used(group: Path) -> float:
    """The most gigabytes that a control group held at once."""
    found = next(group / name for name in ("memory.max_usage_in_bytes", "memory.peak") if (group / name).exists())
    return round(int(found.read_text()) / 1e9, 2)


def child(words: list[str], group: Path | None = None) -> dict[str, object]:
    """Seconds and memory of a process that writes the name of each stage when it begins."""
    began = time.perf_counter()

    def join() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, preexec_fn=join)
    assert process.stdout is not None
    lines, output = ["start"], process.stdout
    reader = threading.Thread(target=lambda: lines.extend(line.strip() for line in output))
    reader.start()
    peaks: dict[str, dict[str, float]] = {}
    while reader.is_alive():
        peak = peaks.setdefault(lines[-1], {})
        for kind, now in memory(process.pid).items():
            peak[kind] = max(peak.get(kind, 0.0), now)
        reader.join(0.01)
    _, status, usage = os.wait4(process.pid, 0)
    said = lines[-1] if len(lines) > 1 else ""
    stages = {name: peak for name, peak in peaks.items() if peak and name != said}
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "anonymous_gb": round(max(peak["anonymous"] for peak in stages.values()), 2),
        "resident_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "stages": {name: {kind: round(now, 2) for kind, now in peak.items()} for name, peak in stages.items()},
        "exit": os.waitstatus_to_exitcode(status),
        "said": said[:300],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--width", type=int, default=1250, help="of every layer")
    parser.add_argument("--layers", type=int, default=448)
    parser.add_argument("--steps", nargs="+", default=["rewrite", "analyze", "optimize", "planned"])
    parser.add_argument("--heavy", type=int, default=heft.HEAVY, help="bytes from which a model counts as heavy")
    parser.add_argument("--within", type=float, metavar="GB", help="memory that a step may take, by a control group")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder: Path = given.folder.resolve()
    if given.step:
        heft.HEAVY = given.heavy
        latest = [""]

        def progress(stage: str, done: int, total: int) -> None:
            del done, total
            if stage != latest[0]:
                print(stage, flush=True)
            latest[0] = stage

        print(step(given.step, folder, progress), flush=True)
        return 0
    path = folder / "big.onnx"
    (folder / "out").mkdir(parents=True, exist_ok=True)
    if not path.exists():
        save(folder, given.width, given.layers)
    samples = np.random.default_rng(1).standard_normal((6, 4, given.width)).astype(np.float32)
    np.savez(folder / "x.npz", x=samples)
    size = path.stat().st_size + given.layers * given.width**2 * 4
    result: dict[str, object] = {
        "model_gb": round(size / 1e9, 2),
        "sites": given.layers,
        "width": given.width,
        "rewritten": len(INCLUDED),
    }
    if given.within:
        result["within_gb"] = given.within
    for name in given.steps:
        words = [sys.executable, __file__, str(folder), "--step", name, "--heavy", str(given.heavy)]
        if not given.within:
            result[name] = child(words)
        else:
            forget(folder)
            group = control_group(given.within)
            result[name] = child(words, group) | {"group_gb": most_used(group)}
            group.rmdir()
        print(name, json.dumps(result[name]), flush=True)
    result["machine"] = f"{os.cpu_count()} cores, page size {resource.getpagesize()}"
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
