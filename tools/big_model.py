"""A model of 2.8 GB with external data: analyse and optimise two of its sites; peak memory and seconds of each step.

    tools/big_model.py DIR --json docs/benchmarks/big-model.json

The weights are random, spread over four data files with gaps before their offsets, one of them a symbolic link and one
a hard link into a store. Every step runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

WIDTH, LAYERS, FILES = 5000, 28, 4
INCLUDED = ("block3/linear", "block20/linear")
PAGE = 65536


def save(folder: Path) -> Path:
    """The model; weights are written a layer at a time."""
    path, store = folder / "big.onnx", folder / "store"
    store.mkdir(parents=True, exist_ok=True)
    rng, nodes, tensors, name = np.random.default_rng(0), [], [], "x"
    offsets = [PAGE] * FILES
    for i in range(LAYERS):
        file = i % FILES
        low = rng.standard_normal((WIDTH, 64), np.float32) @ rng.standard_normal((64, WIDTH), np.float32)
        weight = low / np.float32(8 * WIDTH**0.5)
        with (store / f"part{file}").open("r+b" if offsets[file] > PAGE else "wb") as data:
            data.seek(offsets[file])
            data.write(weight.tobytes())
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", f"part{file}.bin"), ("offset", offsets[file]), ("length", weight.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        offsets[file] += weight.nbytes + PAGE
        tensors.append(tensor)
        nodes += [helper.make_node("MatMul", [name, f"w{i}"], [f"m{i}"], name=f"block{i}/linear"),
                  helper.make_node("Tanh", [f"m{i}"], [f"y{i}"])]  # fmt: skip
        name = f"y{i}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", WIDTH]) for n in ("x", name)]
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


def rewrite(path: Path, out: Path) -> None:
    """Survey, factor two sites without data, write: all that needs no runtime."""
    from onnx_lowrank.files import read_model, write_model
    from onnx_lowrank.graph import Graph
    from onnx_lowrank.passes.survey import survey
    from onnx_lowrank.passes.svd import SVD
    from onnx_lowrank.rewrite import patch_of

    file = read_model(path)
    graph = Graph(file.model, file.folder)
    sites = survey(graph).sites
    assert len(sites) == LAYERS
    for site in sites:
        if site.name in INCLUDED:
            rng = np.random.default_rng(0)
            basis = np.linalg.qr(site.weight @ rng.standard_normal((WIDTH, 96), np.float32))[0].astype(np.float64)
            fragment = SVD.build(site.geometry, basis, basis.T @ site.weight, site.bias_vector)
            graph.apply(patch_of(site, fragment, "svd"))
    write_model(graph.commit(), out, folder=file.folder, external=True)


def child(words: list[str]) -> dict[str, object]:
    """Seconds and peak memory of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    said = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    last = " ".join((said[0].strip().splitlines() or [""])[:1] + said[1].strip().splitlines()[-1:])
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "exit": os.waitstatus_to_exitcode(status),
        "said": last[:300],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--rewrite", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--skip-optimize", action="store_true", help="only what needs no runtime")
    given = parser.parse_args()
    if given.rewrite:
        rewrite(*given.rewrite)
        return 0
    path, out = given.folder / "big.onnx", given.folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        save(given.folder)
    np.savez(given.folder / "x.npz", x=np.random.default_rng(1).standard_normal((6, 4, WIDTH)).astype(np.float32))
    steps = {"rewrite": [sys.executable, __file__, str(given.folder), "--rewrite", str(path), str(out / "big.onnx")]}
    include = [word for name in INCLUDED for word in ("--include", name)]
    common = [
        "-d",
        str(given.folder / "x.npz"),
        "--cache",
        str(given.folder / "cache"),
        "-q",
        "--kinds",
        "svd",
        *include,
    ]
    tool = [sys.executable, "-m", "onnx_lowrank"]
    if not given.skip_optimize:
        steps["analyze"] = [*tool, "analyze", str(path), *common]
        steps["optimize"] = [*tool, "optimize", str(path), "-o", str(out / "big-lr.onnx"), *common]
    size = path.stat().st_size + sum(LAYERS // FILES * WIDTH * WIDTH * 4 for _ in range(FILES))
    result: dict[str, object] = {"model_gb": round(size / 1e9, 2), "sites": LAYERS, "rewritten": len(INCLUDED)}
    for name, words in steps.items():
        result[name] = child(words)
        print(name, result[name], flush=True)
    result["machine"] = f"{os.cpu_count()} cores, page size {resource.getpagesize()}"
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
