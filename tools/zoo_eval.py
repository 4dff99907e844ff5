"""Held-out evaluation of the zoo's models on labelled data; one line of results.

    python tools/zoo_eval.py textdet craft.onnx 16 --side 480
    python tools/zoo_eval.py sts minilm.onnx --data FOLDER

textdet, ocr: rendered here (DejaVu fonts; words of this Python's ast.py, so compare numbers of one Python only).
sts, retrieval, imagenet: FOLDER holds stsb-en-dev.csv, debdesc.json, imagenet/CCCC_name.jpg.
"""

# mypy: disable-error-code="import-not-found,import-untyped,unused-ignore"

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata
from zoo_eval_text import ocr, textdet

from onnx_lowrank.errors import LowRankError
from onnx_lowrank.runtime import Session

Scores = dict[str, float]


def sts(given: argparse.Namespace) -> Scores:
    """Spearman correlation of the embeddings' cosine with human scores."""
    with _data(given, "stsb-en-dev.csv").open(encoding="utf8", newline="") as stream:
        rows = list(csv.reader(stream))[: given.n]
    embed = _embedder(given)
    cosine = (embed([row[0] for row in rows]) * embed([row[1] for row in rows])).sum(1)
    human = [float(row[2]) for row in rows]
    return {"spearman": float(np.corrcoef(rankdata(cosine), rankdata(human))[0, 1])}


def retrieval(given: argparse.Namespace) -> Scores:
    """Find a package's long description by its synopsis, among all."""
    rows = json.loads(_data(given, "debdesc.json").read_text(encoding="utf8"))[: given.n or 600]
    embed = _embedder(given)
    alike = embed([row[1] for row in rows]) @ embed([row[2] for row in rows]).T
    rank = (alike > np.diag(alike)[:, None]).sum(1)
    return {"recall_at_1": float((rank == 0).mean()), "mrr": float((1 / (rank + 1)).mean())}


def imagenet(given: argparse.Namespace) -> Scores:
    """Top-1 and top-5 on photographs named by their class."""
    files = sorted(_data(given, "imagenet").glob("*.jpg"))[: given.n]
    session = Session(given.model, threads=given.threads)
    name = session.inputs()[0][0]
    batches = [np.stack([_photograph(f) for f in files[k : k + 10]]) for k in range(0, len(files), 10)]
    scores = np.concatenate([session.run({name: batch})[0] for batch in batches])
    best = np.argsort(-scores, 1)[:, :5]
    right = best == np.array([int(file.name[:4]) for file in files])[:, None]
    return {"top1": float(right[:, 0].mean()), "top5": float(right.any(1).mean())}


def _photograph(file: Path, side: int = 224) -> Any:
    """The middle of a photograph, as EfficientNet-Lite reads it."""
    from PIL import Image

    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    edge = int(side / (side + 32) * min(picture.size))
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    middle = picture.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.BICUBIC)
    return ((np.asarray(middle, np.float32) / 255 - 0.498) / 0.502).transpose(2, 0, 1).astype(np.float32)


def _embedder(given: argparse.Namespace) -> Callable[[list[str]], Any]:
    """Mean-pooled, normalised sentence embeddings, 32 sentences of like length at a time."""
    from tokenizers import Tokenizer

    file = given.tokenizer or given.model.with_name("minilm_tokenizer.json")
    if not file.is_file():
        sys.exit(f"no tokenizer at {file}; tools/zoo_build.py writes it beside minilm.onnx; or give --tokenizer")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    session = Session(given.model, threads=given.threads)
    names = [name for name, _, _ in session.inputs()]

    def embed(texts: list[str]) -> Any:
        order, out = np.argsort([len(text) for text in texts]), np.zeros((len(texts), 384), np.float32)
        for k in range(0, len(texts), 32):
            batch = order[k : k + 32]
            tokens = tokenizer.encode_batch([texts[j] for j in batch])
            ids = np.array([t.ids for t in tokens], np.int64)
            mask = np.array([t.attention_mask for t in tokens], np.int64)
            feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            hidden = session.run({name: feed[name] for name in names})[0]
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None]
            out[batch] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return out

    return embed


def _data(given: argparse.Namespace, name: str) -> Path:
    path: Path = given.data / name
    if not path.exists():
        sys.exit(f"no {name} in {given.data}; name the folder that holds it with --data")
    return path


_TASKS: dict[str, Callable[[argparse.Namespace], Scores]] = {
    "textdet": textdet, "sts": sts, "retrieval": retrieval, "imagenet": imagenet, "ocr": ocr,
}  # fmt: skip


def main() -> None:
    """Evaluate one model on one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(_TASKS))
    parser.add_argument("model", type=Path)
    parser.add_argument("n", type=int, nargs="?", help="samples: all of a file; textdet 16, ocr 150, retrieval 600")
    parser.add_argument("--side", type=int, default=480, help="edge of a rendered page [default: 480]")
    parser.add_argument("--data", type=Path, default=Path("../shared/zoo/data"), metavar="FOLDER")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: minilm_tokenizer.json beside MODEL")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    try:
        scores = _TASKS[given.task](given)
    except LowRankError as fault:
        sys.exit(str(fault))
    print(" ".join(f"{name}={value:.4f}" for name, value in scores.items()))


if __name__ == "__main__":
    main()
