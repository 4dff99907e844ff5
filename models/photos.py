"""Photographs that come inside two packages, and random crops of them."""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from onnx_lowrank.errors import RuntimeMissing
from onnx_lowrank.models.packages import Wheel, fetch, read_member

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["backgrounds", "crops", "held_out", "photographs", "require_pillow"]

_SKIMAGE: Final = Wheel(
    "scikit-image", "0.26.0", "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    platform="manylinux_2_28_x86_64",
)  # fmt: skip
_SKLEARN: Final = Wheel(
    "scikit-learn", "1.9.1", "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    platform="manylinux_2_28_x86_64",
)  # fmt: skip
# The wheels' hashes pin the pictures. _HELD_OUT are the backgrounds that tools/zoo_eval.py draws its pages on.
_HELD_OUT: Final = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
_OTHERS: Final = (
    "motorcycle_left.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg", "camera.png", "coins.png", "moon.png",
    "grass.png", "gravel.png", "brick.png",
)  # fmt: skip
_TWO: Final = ("china.jpg", "flower.jpg")


def require_pillow() -> None:
    """Refuse early where pictures cannot be made.

    Raises:
        RuntimeMissing: pillow is not installed, or built without FreeType.
    """
    try:
        from PIL import ImageFont

        ImageFont.load_default(20).getbbox("a")
    except (ImportError, TypeError, OSError) as fault:
        raise RuntimeMissing(
            f"calibration inputs need pillow 10.1 or newer ({fault}); install it: pip install 'onnx-lowrank[zoo]'"
        ) from None


def photographs() -> tuple[Image, ...]:
    """All 16 photographs, in RGB."""
    return tuple(_load().values())


def backgrounds() -> tuple[Image, ...]:
    """The 12 photographs that no evaluation uses as a background."""
    return tuple(picture for name, picture in _load().items() if name not in _HELD_OUT)


def held_out() -> tuple[Image, ...]:
    """The 4 photographs that evaluations draw their pages on."""
    return tuple(_load()[name] for name in _HELD_OUT)


def crops(rng: np.random.Generator, pictures: Sequence[Image], count: int, side: int) -> npt.NDArray[np.uint8]:
    """Random square crops (count × side × side × 3): every picture equally often, in random order; scale, flip,
    brightness at random."""
    rounds = [rng.permutation(len(pictures)) for _ in range(-(-count // len(pictures)))]
    return np.stack([_crop(rng, pictures[k], side) for k in np.concatenate(rounds)[:count]])


def _crop(rng: np.random.Generator, picture: Image, side: int) -> npt.NDArray[np.uint8]:
    from PIL import Image as Pillow

    edge = int(min(picture.size) * rng.uniform(0.4, 1.0))
    left = int(rng.integers(0, picture.width - edge + 1))
    top = int(rng.integers(0, picture.height - edge + 1))
    part = picture.crop((left, top, left + edge, top + edge)).resize((side, side), Pillow.Resampling.BICUBIC)
    pixels: npt.NDArray[Any] = np.asarray(part, np.float32) * rng.uniform(0.7, 1.25)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels.clip(0, 255).astype(np.uint8)


@functools.cache
def _load() -> dict[str, Image]:
    """Photographs by name; downloaded once a process (pip keeps its own cache)."""
    require_pillow()
    found: dict[str, Image] = {}
    for wheel, folder, names in (
        (_SKIMAGE, "skimage/data", _HELD_OUT + _OTHERS),
        (_SKLEARN, "sklearn/datasets/images", _TWO),
    ):
        with tempfile.TemporaryDirectory() as scratch:
            path = fetch(wheel, Path(scratch))
            found.update({name: _picture(read_member(path, f"{folder}/{name}")) for name in names})
    return found


def _picture(content: bytes) -> Image:
    from PIL import Image as Pillow

    return Pillow.open(io.BytesIO(content)).convert("RGB")
