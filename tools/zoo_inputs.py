"""Inputs of the models that tools/zoo_build.py builds; `fresh` asks for other samples of the same sort."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from onnx_lowrank.models import inputs

Inputs = inputs.Inputs


def craft(model: Path, *, fresh: bool = False) -> Inputs:
    """24 rendered pages of 320×320 (seeds and photographs other than the evaluation's)."""
    return inputs.pages(model, name="image", count=24, side=320, fresh=fresh)


def efficientnet(model: Path, *, fresh: bool = False) -> Inputs:
    """64 crops of photographs, 224×224, as EfficientNet-Lite0 reads them."""
    pixels = inputs.photo_crops(model, count=64, side=224, fresh=fresh)["input"]
    scaled = (pixels - np.float32(0.498)) / np.float32(0.502)
    return {"input": np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))}


def minilm(model: Path, *, fresh: bool = False) -> Inputs:
    """256 passages of 64 tokens out of Python's docstrings, by the vocabulary that all English BERTs share."""
    found = inputs.token_passages(model, fresh=fresh)
    return found | {"token_type_ids": np.zeros_like(found["input_ids"])}


MAKERS: Final[dict[str, inputs.Maker]] = {"craft": craft, "efficientnet": efficientnet, "minilm": minilm}
"""By model."""
