"""Kill `optimize` at random times: OUT is never partial, and `--resume` gives the bytes of an undisturbed run.

    tools/kill_test.py --kills 100 --seed 0

A run on a small model is ended by SIGKILL, SIGTERM or SIGINT after a random part of its time; OUT must then be absent,
the previous one, or complete. A second run with the same --resume folder must write the very bytes of the undisturbed
run and leave nothing else. All runs plan with one exported latency table, so that they choose the same plan, and time
nothing. Prints the counts.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PREVIOUS = ("previous/out.onnx", "previous/out.onnx.data")
"""Another model of the same name, with a data file that bears OUT's name, too."""


def save_model(path: Path, layers: int = 3, width: int = 384) -> None:
    """Dense layers of exact rank 16, with their weights in a data file, and samples beside it."""
    rng, nodes, tensors, name = np.random.default_rng(0), [], [], "x"
    for i in range(layers):
        weight = rng.standard_normal((width, 16)) @ rng.standard_normal((16, width)) / width
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"w{i}"))
        nodes += [helper.make_node("MatMul", [name, f"w{i}"], [f"t{i}"], name=f"layer{i}"),
                  helper.make_node("Relu", [f"t{i}"], [f"y{i}"])]  # fmt: skip
        name = f"y{i}"
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", width]) for n in ("x", name)]
    graph = helper.make_graph(nodes, "wide", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    np.savez(path.with_suffix(".npz"), x=rng.standard_normal((12, 32, width)).astype(np.float32))


def measure_table(root: Path) -> None:
    """Time the model's replacements once, and export the table."""
    tool = [sys.executable, "-m", "onnx_lowrank"]
    analyze = [*tool, "analyze", "wide.onnx", "-d", "wide.npz", "--cache", "cache", "-q", "--no-refit"]
    for words in (analyze, [*tool, "cache", "export", "table.json", "--cache", "cache"]):
        done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def begin(folder: Path, *more: str) -> subprocess.Popen[str]:
    """`optimize` in a folder of its own."""
    command = [sys.executable, "-m", "onnx_lowrank", "optimize", "../wide.onnx", "-o", "out.onnx", "-d", "../wide.npz"]
    command += ["--cache", "../table.json", "--no-verify-latency", "-q", "--max-loss", "0.001", *more]
    return subprocess.Popen(
        command,
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # Jobs that a shell starts in the background inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def made(folder: Path) -> tuple[bytes, bytes]:
    """OUT and the data that it refers to, empty where there is none.

    Raises:
        AssertionError: OUT is cut short, or its data is not there.
    """
    out = folder / "out.onnx"
    if not out.exists():
        return b"", b""
    content = out.read_bytes()
    names = {e.value for t in onnx.load_from_string(content).graph.initializer for e in t.external_data
             if e.key == "location"}  # fmt: skip
    assert all((folder / name).exists() for name in names), "OUT without its data"
    return content, b"".join((folder / name).read_bytes() for name in sorted(names))


def kill_once(root: Path, whole: tuple[bytes, bytes], seconds: float, rng: random.Random) -> str:
    """One kill and one resumption.

    Raises:
        AssertionError: a partial OUT, other bytes, or something left behind.
    """
    folder = Path(tempfile.mkdtemp(dir=root))
    before = rng.random() < 0.5
    if before:
        for name in PREVIOUS:
            shutil.copy(root / name, folder)
    old = made(folder)
    process, number = begin(folder, "--resume", "stages"), rng.choice(SIGNALS)
    time.sleep(rng.uniform(0, seconds))
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert "Traceback" not in said, said
    assert made(folder) in (old, whole), "OUT is neither the old one nor complete"
    stages = len(list(folder.glob("stages/*.npz")))
    time.sleep(1.1)  # what is younger than a second is nobody's to remove
    process = begin(folder, "--resume", "stages")
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert made(folder) == whole, f"other bytes after {stages} stages"
    left = {p.name for p in folder.iterdir() if not p.match("out.onnx*")} - {"stages"}
    left |= {p.name for p in list(folder.glob("out.onnx.*"))[1:]}
    left |= {p.name for p in folder.glob("stages/.*")}
    assert not left, f"left behind: {left}"
    shutil.rmtree(folder)
    return f"{signal.Signals(number).name} after {stages} stages{' over a previous one' * before}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result there")
    given = parser.parse_args()
    rng, counts, failures = random.Random(given.seed), collections.Counter[str](), []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kill-") as scratch:
        root = Path(scratch)
        save_model(root / "wide.onnx")
        (root / "previous").mkdir()
        save_model(root / "previous" / "out.onnx", layers=2)
        measure_table(root)
        undisturbed = root / "undisturbed"
        undisturbed.mkdir()
        start = time.perf_counter()
        process = begin(undisturbed)
        assert process.wait(600) == 0, process.communicate()[1]
        seconds = time.perf_counter() - start
        whole = made(undisturbed)
        assert len(whole[1]) < (root / "wide.onnx.data").stat().st_size, "nothing was rewritten"
        for kill in range(given.kills):
            try:
                counts[kill_once(root, whole, seconds, rng)] += 1
            except AssertionError as fault:
                failures.append(f"kill {kill}: {fault}")
                print(failures[-1], file=sys.stderr, flush=True)
    result = {
        "kills": given.kills, "seed": given.seed, "seconds": round(time.perf_counter() - began, 1),
        "undisturbed_seconds": round(seconds, 2), "outcomes": dict(sorted(counts.items())), "failures": failures,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
