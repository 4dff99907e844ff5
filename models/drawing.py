"""Rendered text with pillow's own font: lines for text recognisers, pages for text detectors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

__all__ = ["code", "line", "page", "words"]

_TEXT: Final = """
about above across after again air almost along also always animal another answer around autumn back ball bank basket
because become before begin behind below between bird board body book both bottle bread bridge bright bring brother
build butter camera carry castle catch centre chair change cheese children circle clear clock close coffee colour come
common corner country course cover cross dark daughter day deep different dinner direct door dream drive during early
earth east engine enough evening every example family farmer father figure final finger fire fish flower follow forest
friend front garden gentle glass gold great green ground happy harbour heavy history home horse hotel house idea island
January journey kitchen language large laugh leave letter light little London machine market measure metal minute
Monday money morning mother mountain music narrow nature never night north notice number ocean office open orange order
paper people picture plant point power quarter question quick quiet rain reason record river road round school science
second sentence seven shape short silver simple sister small snow song south special square station stone story street
strong summer sunday system table teacher ticket together travel under university village voice water weather west
window winter wonder work yellow young zebra Exit Open Price Total Street Hotel Museum Service Welcome Warning
"""
_WORDS: Final = _TEXT.split()
_CODE: Final = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"


def words(rng: np.random.Generator) -> str:
    """One to three words, at times in capitals or with a number."""
    text = " ".join(str(rng.choice(_WORDS)) for _ in range(rng.integers(1, 4)))
    if rng.random() < 0.2:
        text = text.upper()
    return f"{text} {rng.integers(0, 10000)}" if rng.random() < 0.4 else text


def code(rng: np.random.Generator) -> str:
    """Four to six letters and digits, as in a captcha."""
    return "".join(str(rng.choice(list(_CODE))) for _ in range(rng.integers(4, 7)))


def line(rng: np.random.Generator, text: str, aspect: float = 0.0) -> Image:
    """One line of text: size, boldness, colours, rotation, blur and noise at random; at least `aspect` times as wide as
    it is high."""
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFilter

    font, bold = _font(int(rng.integers(15, 36))), int(rng.random() < 0.3)
    left, top, right, bottom = font.getbbox(text, stroke_width=bold)
    height = int(bottom - top) + int(rng.integers(8, 18))
    width = max(int(right - left) + 14, round(height * aspect))
    light = rng.integers(140, 256, 3)
    dark = (light * rng.uniform(0.0, 0.6, 3)).astype(int)
    paper, ink = (_rgb(light), _rgb(dark)) if rng.random() < 0.8 else (_rgb(dark), _rgb(light))
    picture = Pillow.new("RGB", (width, height), paper)
    spot = ((width - right - left) / 2, (height - bottom - top) / 2)
    ImageDraw.Draw(picture).text(spot, text, font=font, fill=ink, stroke_width=bold)
    picture = picture.rotate(rng.uniform(-2.5, 2.5), resample=Pillow.Resampling.BICUBIC, fillcolor=paper)
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.6)))
    return Pillow.fromarray(_noisy(rng, picture, rng.uniform(2, 28)))


def page(rng: np.random.Generator, side: int, pictures: Sequence[Image]) -> npt.NDArray[np.uint8]:
    """Up to twelve words apart from each other, over a photograph or a plain colour, with noise (side × side × 3)."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    if rng.random() < 0.7:
        photo = pictures[int(rng.integers(len(pictures)))]
        paper = photo.resize((side, side), Pillow.Resampling.BICUBIC)
    else:
        paper = Pillow.new("RGB", (side, side), _rgb(rng.integers(0, 256, 3)))
    pen, taken = ImageDraw.Draw(paper), list[tuple[float, ...]]()
    for _ in range(40):
        if len(taken) == 12:
            break
        text, font = str(rng.choice(_WORDS)), _font(int(rng.integers(16, 41)))
        x, y = (int(v) for v in rng.integers(5, side - 50, 2))
        box = pen.textbbox((x, y), text, font=font)
        if max(box[2], box[3]) > side - 3 or any(_near(box, other) for other in taken):
            continue
        below = np.asarray(paper.crop((x, y, int(box[2]), int(box[3])))).mean()
        shade = int(rng.integers(0, 90)) if below > 127 else int(rng.integers(170, 256))
        pen.text((x, y), text, font=font, fill=(shade, shade, shade), stroke_width=int(rng.random() < 0.3))
        taken.append(box)
    return _noisy(rng, paper, 6.0)


def _near(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] + 12 and b[0] < a[2] + 12 and a[1] < b[3] + 8 and b[1] < a[3] + 8


def _noisy(rng: np.random.Generator, picture: Image, deviation: float) -> npt.NDArray[np.uint8]:
    pixels: npt.NDArray[Any] = np.asarray(picture, np.float32)
    noisy: npt.NDArray[Any] = pixels + rng.normal(0, deviation, pixels.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def _rgb(values: npt.NDArray[Any]) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in values)
    return red, green, blue


@functools.cache
def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)
