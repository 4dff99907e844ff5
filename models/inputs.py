"""Real calibration inputs for the catalogue's models. Seeds are fixed: one machine always makes the same samples.

`count` says how many; `fresh` asks for other samples of the same sort, to measure on what nothing was fitted to.

An array has the rank of the model's input (its first axis is cut into samples) or one more (a sample an item).
"""

from __future__ import annotations

import sysconfig
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from onnx_lowrank.models import drawing, photos, speech, text
from onnx_lowrank.runtime import Session

__all__ = [
    *("Inputs", "captchas", "files", "pages", "photo_crops", "speech_windows", "text_lines"),
    *("token_passages", "turned_lines"),
]

Inputs = dict[str, npt.NDArray[Any]]


class Maker(Protocol):
    """Makes the inputs of a model."""

    def __call__(self, model: Path, /, *, count: int = ..., fresh: bool = False) -> Inputs: ...


# A detector's pages must not repeat those that an evaluation renders (its seed is 3).
_SEED: Final = 20250
_MEAN: Final = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION: Final = np.array([0.229, 0.224, 0.225], np.float32)


def _rng(fresh: bool) -> np.random.Generator:
    return np.random.default_rng(_SEED + fresh)


def photo_crops(_model: Path, *, name: str = "input", count: int = 64, side: int = 240, fresh: bool = False) -> Inputs:
    """Crops of photographs, in [0, 1], channels last."""
    pixels = photos.crops(_rng(fresh), photos.photographs(), count, side)
    return {name: pixels.astype(np.float32) / np.float32(255)}


def token_passages(_model: Path, *, count: int = 256, length: int = 64, fresh: bool = False) -> Inputs:
    """Passages of English docstrings as BERT token ids, without padding."""
    ids = text.passages(count, length, fresh=fresh)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def pages(_model: Path, *, name: str = "x", count: int = 48, side: int = 384, fresh: bool = False) -> Inputs:
    """Rendered pages over photographs, normalised by ImageNet's mean and deviation."""
    rng, behind = _rng(fresh), photos.backgrounds()
    pixels = np.stack([drawing.page(rng, side, behind) for _ in range(count)])
    scaled = (pixels.astype(np.float32) / np.float32(255) - _MEAN) / _DEVIATION
    return {name: np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))}


def text_lines(_model: Path, *, count: int = 192, width: int = 320, fresh: bool = False) -> Inputs:
    """Rendered lines of words for a PP-OCR recogniser: 48 high, BGR, in [-1, 1], zeros after the text."""
    rng = _rng(fresh)
    return {"x": np.stack([_ppocr(drawing.line(rng, drawing.words(rng)), width) for _ in range(count)])}


def turned_lines(_model: Path, *, count: int = 256, fresh: bool = False) -> Inputs:
    """Rendered lines for the direction classifier, 48×192, every other one upside down."""
    rng = _rng(fresh)
    lines = [drawing.line(rng, drawing.words(rng)) for _ in range(count)]
    return {"x": np.stack([_ppocr(line.rotate(180 * (k % 2)), 192) for k, line in enumerate(lines)])}


def captchas(_model: Path, *, count: int = 64, width: int = 176, fresh: bool = False) -> Inputs:
    """Rendered codes of letters and digits: grey, 64 high, in [0, 1]."""
    rng = _rng(fresh)
    lines = [drawing.line(rng, drawing.code(rng), aspect=width / 64) for _ in range(count)]
    grey = [np.asarray(line.convert("L").resize((width, 64)), np.float32) / np.float32(255) for line in lines]
    return {"input1": np.stack(grey)[:, None]}


def files(_model: Path, *, count: int = 256, fresh: bool = False) -> Inputs:
    """First and last bytes of files of Python's standard library, as Magika cuts them (256 is padding)."""
    rows = []
    for path in _library_files(count, fresh):
        content = path.read_bytes()
        head, tail = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
        rows.append([*head, *[256] * (1024 - len(head)), *[256] * (1024 - len(tail)), *tail])
    return {"bytes": np.array(rows, np.int32)}


def speech_windows(model: Path, *, count: int = 256, fresh: bool = False) -> Inputs:
    """Windows of a synthetic speech-like signal, with the state that the model itself had reached before each."""
    session = Session(model)
    shapes = {name: [1 if not isinstance(d, int) else d for d in shape] for name, _, shape in session.inputs()}
    carried = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name not in ("input", "sr")}
    step = 24 if "h" in shapes else 1  # the sequence model takes many windows in one run
    every = 1 if step > 1 else 8
    frames = speech.windows(speech.speech_like(_rng(fresh), step * every * count * 0.032 + 1))
    samples: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in shapes}
    for k in range(every * count):
        feed = {"input": frames[k * step : (k + 1) * step], **carried}
        if "sr" in shapes:
            feed["sr"] = np.array(speech.RATE, np.int64)
        for name in shapes if k % every == every - 1 else ():
            samples[name].append(feed[name])
        carried = dict(zip(carried, session.run(feed)[1:], strict=True))
    return {name: np.stack(arrays) for name, arrays in samples.items()}


def _ppocr(line: Any, width: int) -> npt.NDArray[np.float32]:
    """A line as PP-OCR reads it: 48 high, no wider than `width`, BGR, (x/255 - 0.5)/0.5, channels first."""
    wide = min(width, max(48, round(line.width * 48 / line.height)))
    pixels = np.asarray(line.resize((wide, 48)), np.float32)[:, :, ::-1]
    out = np.zeros((3, 48, width), np.float32)
    out[:, :, :wide] = ((pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1)
    return out


def _library_files(count: int, fresh: bool) -> list[Path]:
    """Every other file of the standard library, the kinds (suffixes) in turn, evenly out of each."""
    root, kinds = Path(sysconfig.get_path("stdlib")), dict[str, list[Path]]()
    for path in sorted(root.rglob("*")):
        if path.suffix and "site-packages" not in path.parts and path.is_file() and path.stat().st_size > 200:
            kinds.setdefault(path.suffix, []).append(path)
    halves = [found[int(fresh) :: 2] for _, found in sorted(kinds.items())]
    spread = [found[:: max(1, len(found) // count)] for found in halves]
    turns = [path for turn in zip_longest(*spread) for path in turn if path is not None]
    return turns[:count]
