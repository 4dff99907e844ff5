"""Random-weight architectures from transformers configs, exported by torch, through `optimize` with made-up inputs.

    tools/random_exports.py DIR --json docs/benchmarks/random-exports.json

Needs torch, transformers and onnxscript. Weights are random, so their spectra are flat and nothing should pay: what is
shown is that such graphs are finished with a verified file or refused in one clear line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("resnet", "vit", "bert", "gpt2")


def bare(model: Any, call: Callable[[Any, Any], Any]) -> Any:
    """A module of one input and one tensor as output."""
    import torch

    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Any) -> Any:
            return call(self.model, x)

    return Bare().eval()


def made(name: str) -> tuple[Any, Any, str]:
    """A module, an example of its input, and the input's name."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    image, tokens = torch.randn(1, 3, 64, 64), torch.randint(0, 500, (1, 32))
    if name == "resnet":
        config = t.ResNetConfig(embedding_size=32, hidden_sizes=[64, 128], depths=[2, 2], layer_type="basic")
        return bare(t.ResNetModel(config), lambda m, x: m(x).last_hidden_state), image, "pixel_values"
    if name == "vit":
        config = t.ViTConfig(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768,
                             image_size=64, patch_size=16)  # fmt: skip
        return bare(t.ViTModel(config), lambda m, x: m(x).last_hidden_state), image, "pixel_values"
    if name == "bert":
        config = t.BertConfig(vocab_size=1000, hidden_size=192, num_hidden_layers=2, num_attention_heads=3,
                              intermediate_size=768, attn_implementation="eager")  # fmt: skip
        return bare(t.BertModel(config), lambda m, x: m(x).last_hidden_state), tokens, "input_ids"
    config = t.GPT2Config(vocab_size=1000, n_embd=192, n_layer=2, n_head=3, attn_implementation="eager")
    return bare(t.GPT2LMHeadModel(config), lambda m, x: m(x, use_cache=False).logits), tokens, "input_ids"


def export(name: str, path: Path, dynamo: bool) -> None:
    """Write the ONNX file of an architecture."""
    import torch

    warnings.simplefilter("ignore")
    module, example, input_name = made(name)
    with torch.no_grad():
        torch.onnx.export(
            module, (example,), str(path), input_names=[input_name], output_names=["out"], dynamo=dynamo, verbose=False
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--tool", default=sys.executable, help="Python that has onnx-lowrank")
    parser.add_argument("--only", choices=NAMES)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    for name in [given.only] if given.only else NAMES:
        for dynamo in (False, True):
            label = f"{name} {'dynamo' if dynamo else 'torchscript'}"
            path = given.folder / f"{label.replace(' ', '-')}.onnx"
            try:
                export(name, path, dynamo)
            except Exception as fault:  # the exporter's own affair
                result[label] = {"export": f"{type(fault).__name__}: {' '.join(str(fault).split())[:150]}"}
                continue
            began = time.perf_counter()
            words = ["optimize", str(path), "-o", str(path.with_suffix(".out.onnx")), "--json", "--no-refit"]
            done = subprocess.run(
                [given.tool, "-m", "onnx_lowrank", *words, "--cache", str(given.folder / "cache")],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            report = json.loads(done.stdout) if done.returncode == 0 else {}
            verdict = report.get("verdict", {})
            result[label] = {
                "exit": done.returncode,
                "seconds": round(time.perf_counter() - began, 1),
                "status": report.get("status"),
                "sites": len(report.get("sites", ())),
                "said": verdict.get("reason") or done.stderr.strip()[:300],
                "traceback": "Traceback" in done.stderr,
            }
            print(label, result[label], flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row.get("traceback") for row in result.values()))


if __name__ == "__main__":
    sys.exit(main())
