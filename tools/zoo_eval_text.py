"""Text detection and recognition on rendered pages and lines with known words. Used by zoo_eval.py."""

# mypy: disable-error-code="import-untyped,unused-ignore"

from __future__ import annotations

import argparse
import ast
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy import ndimage

from onnx_lowrank.models import find, photos
from onnx_lowrank.models.packages import fetch, read_member
from onnx_lowrank.runtime import Session

Box = tuple[float, ...]
Scores = dict[str, float]

_MEAN, _DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
_LETTERS = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"


def textdet(given: argparse.Namespace) -> Scores:
    """Word recall and precision (boxes that overlap by more than 0.4) of CRAFT or PP-OCR detection."""
    session = Session(given.model, threads=given.threads)
    name, side = session.inputs()[0][0], given.side
    pages, noise = random.Random(3), np.random.default_rng(3)
    behind, words, fonts = photos.held_out(), _words(ast.__file__), _fonts()
    hits = drawn = found = 0
    for _ in range(given.n or 16):
        pixels, boxes = _page(pages, noise, side, behind, words, fonts)
        feed = ((pixels / 255 - _MEAN) / _DEVIATION).astype(np.float32).transpose(2, 0, 1)[None]
        guesses = _boxes(session.run({name: feed})[0], side)
        hits += sum(any(_overlap(box, guess) > 0.4 for guess in guesses) for box in boxes)
        drawn, found = drawn + len(boxes), found + len(guesses)
    return {"word_recall": hits / drawn, "word_precision": hits / max(found, 1)}


def ocr(given: argparse.Namespace) -> Scores:
    """Exact lines and characters (1 - edit distance / length) of PP-OCR or ddddocr recognition."""
    session = Session(given.model, threads=given.threads)
    name, _, shape = session.inputs()[0]
    captcha = shape[1] == 1
    lines, noise = random.Random(7), np.random.default_rng(7)
    words, fonts, count = _words(ast.__file__, random.__file__), _fonts(), given.n or 150
    alphabet = _captcha_alphabet() if captcha else _ppocr_alphabet(given.model)
    exact = wrong = length = 0
    for _ in range(count):
        text = _code(lines) if captcha else _line(lines, words)
        picture = _render(lines, noise, text, fonts)
        scores = session.run({name: _captcha_feed(picture) if captcha else _ppocr_feed(picture)})[0]
        read = _plain(_decode(scores.reshape(-1, scores.shape[-1]).argmax(1), alphabet))
        wrong += _distance(_plain(text), read)
        length, exact = length + len(_plain(text)), exact + (_plain(text) == read)
    return {"exact": exact / count, "characters": 1 - wrong / length}


def _page(
    rng: random.Random, noise: np.random.Generator, side: int, behind: Any, words: list[str], fonts: list[str]
) -> tuple[Any, list[Box]]:
    """A page of at most twelve words, and their boxes."""
    if rng.random() < 0.7:
        paper = rng.choice(behind).resize((side, side))
    else:
        paper = Image.new("RGB", (side, side), tuple(rng.randint(0, 255) for _ in range(3)))
    pen, boxes = ImageDraw.Draw(paper), list[Box]()
    for _ in range(40):
        if len(boxes) >= 12:
            break
        text, font = rng.choice(words), ImageFont.truetype(rng.choice(fonts), rng.randint(16, 40))
        x, y = rng.randint(5, side - 120), rng.randint(5, side - 60)
        box = pen.textbbox((x, y), text, font=font)
        if max(box[2:]) > side - 3 or any(_near(box, other) for other in boxes):
            continue
        light = sum(paper.getpixel((int(box[0] + box[2]) // 2, int(box[1] + box[3]) // 2))) > 380
        shade = rng.randint(0, 90) if light else rng.randint(170, 255)
        pen.text((x, y), text, font=font, fill=(shade, shade, shade))
        boxes.append(box)
    pixels = np.asarray(paper, np.float32) + noise.normal(0, 6, (side, side, 3))
    return pixels.clip(0, 255).astype(np.uint8), boxes


def _near(a: Box, b: Box) -> bool:
    return a[0] < b[2] + 12 and b[0] < a[2] + 12 and a[1] < b[3] + 8 and b[1] < a[3] + 8


def _boxes(output: Any, side: int) -> list[Box]:
    """Boxes around the connected parts of the score map (CRAFT's two maps are the larger of both)."""
    craft = output.shape[-1] == 2
    score = np.maximum(output[0, :, :, 0] / 0.7, output[0, :, :, 1] / 0.4) * 0.3 if craft else output[0, 0]
    large = ndimage.zoom(score, side / np.array(score.shape), order=1, mode="nearest", grid_mode=True)
    parts, _ = ndimage.label(ndimage.binary_dilation(large > 0.3, np.ones((5, 9), bool)), np.ones((3, 3)))
    areas = np.bincount(parts.ravel())[1:]
    slices = [where for where, area in zip(ndimage.find_objects(parts), areas, strict=True) if area > 60]
    return [(x.start, y.start, x.stop, y.stop) for y, x in slices]


def _overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:
        return 0.0
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return wide * high / (both - wide * high)


def _line(rng: random.Random, words: list[str]) -> str:
    text = " ".join(rng.choice(words) for _ in range(rng.randint(1, 3)))
    return f"{text} {rng.randint(0, 9999)}" if rng.random() < 0.4 else text


def _code(rng: random.Random) -> str:
    return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(4, 6)))


def _render(rng: random.Random, noise: np.random.Generator, text: str, fonts: list[str]) -> Image.Image:
    """The text in dark on light, turned a little, blurred and noisy."""
    font = ImageFont.truetype(rng.choice(fonts), rng.randint(15, 30))
    left, top, right, bottom = font.getbbox(text)
    light = rng.randint(150, 255)
    dark, paper = rng.randint(0, max(0, light - 70)), (light, light, light)
    tint = (light, light, min(255, light + rng.randint(-20, 10)))
    picture = Image.new("RGB", (int(right - left) + 12, int(bottom - top) + 14), tint)
    ImageDraw.Draw(picture).text((6 - left, 7 - top), text, font=font, fill=(dark, dark // 2, dark))
    picture = picture.rotate(rng.uniform(-2.5, 2.5), resample=Image.Resampling.BICUBIC, fillcolor=paper)
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.9)))
    grain = noise.normal(0, rng.uniform(2, 34), (picture.height, picture.width, 3))
    return Image.fromarray((np.asarray(picture, np.float32) + grain).clip(0, 255).astype(np.uint8))


def _ppocr_feed(picture: Image.Image) -> Any:
    """48 high, BGR, in [-1, 1], zeros up to a width of 320."""
    width = max(48, int(picture.width * 48 / picture.height))
    pixels = np.asarray(picture.resize((width, 48), Image.Resampling.BICUBIC), np.float32)[:, :, ::-1]
    feed = np.zeros((1, 3, 48, max(320, width)), np.float32)
    feed[0, :, :, :width] = ((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1)
    return feed


def _captcha_feed(picture: Image.Image) -> Any:
    """64 high, grey, in [0, 1]."""
    width = int(picture.width * 64 / picture.height)
    grey = picture.convert("L").resize((width, 64), Image.Resampling.LANCZOS)
    return (np.asarray(grey, np.float32) / 255)[None, None]


def _decode(best: Any, alphabet: list[str]) -> str:
    """CTC: repeats are one, class 0 is a gap."""
    steps = zip(best, [-1, *best], strict=False)
    return "".join(alphabet[now] for now, before in steps if now not in (0, before))


def _ppocr_alphabet(model: Path) -> list[str]:
    import onnx

    for entry in onnx.load(model, load_external_data=False).metadata_props:
        if entry.key == "character":
            return ["", *entry.value.split("\n"), " "]
    sys.exit(f"{model}: no alphabet ('character') in its metadata")


def _captcha_alphabet() -> list[str]:
    """The alphabet of common.onnx, as ddddocr's source spells it out (nothing of it is run)."""
    with tempfile.TemporaryDirectory() as scratch:
        source = read_member(fetch(find("ddddocr").wheel, Path(scratch)), "ddddocr/charsets.py")
    for statement in ast.parse(source.decode("utf-8-sig")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "CHARSET_BETA":
            return [str(letter) for letter in ast.literal_eval(statement.value)]
    sys.exit("no CHARSET_BETA in ddddocr's source")


def _plain(text: str) -> str:
    return text.lower().replace(" ", "")


def _distance(a: str, b: str) -> int:
    """Edit distance."""
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
        before = row
    return before[-1]


def _words(*files: str) -> list[str]:
    text = "".join(Path(file).read_text(encoding="utf8") for file in files)
    return sorted(set(re.findall(r"[A-Za-z]{3,9}", text)))


def _fonts() -> list[str]:
    """DejaVu's core fonts."""
    found = sorted(str(file) for file in Path("/usr/share/fonts/truetype/dejavu").glob("*.ttf"))
    if not found:
        sys.exit("no DejaVu fonts; install them: apt-get install fonts-dejavu-core")
    return found
