"""Inputs of the models that tools/zoo_build.py builds: `count` of them, or `fresh` ones of the same sort."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from onnx_lowrank.models import inputs

Inputs = inputs.Inputs


def craft(model: Path, *, count: int = 24, fresh: bool = False) -> Inputs:
    """Rendered pages of 320×320 (seeds and photographs other than the evaluation's)."""
    return inputs.pages(model, name="image", count=count, side=320, fresh=fresh)


def efficientnet(model: Path, *, count: int = 64, fresh: bool = False) -> Inputs:
    """Crops of photographs, 224×224, as EfficientNet-Lite0 reads them."""
    pixels = inputs.photo_crops(model, count=count, side=224, fresh=fresh)["input"]
    scaled = (pixels - np.float32(0.498)) / np.float32(0.502)
    return {"input": np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))}


MAKERS: Final[dict[str, inputs.Maker]] = {"craft": craft, "efficientnet": efficientnet}
"""By model."""
