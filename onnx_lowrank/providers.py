"""Execution providers by name, and how one of them is to be used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from onnx_lowrank.errors import SettingsError

PROVIDERS: Final = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "rocm": "ROCMExecutionProvider",
}
"""Full names by the short ones."""

NVIDIA: Final = ("cuda", "tensorrt")
"""Providers whose tensors live on a card: inputs and outputs of timed runs stay there, clocks are synchronised."""

_CAPTURE: Final = ("enable_cuda_graph", "trt_cuda_graph_enable")
_NO: Final = ("0", "false", "False")

Purpose = Literal["samples", "verify", "time"]
"""What a session is for: `samples` runs data through it, `verify` the deployed model on data, `time` only the clock."""


class Provider(str):
    """The name of an execution provider, with how it is to be used: a string wherever a name will do.

    Args:
        name: short or full.
        options: passed to the provider.
        fallback: whether nodes may run on the CPU when the provider has no kernel for them.
        here: whether sessions open on it. Otherwise it is planned for, and everything runs on the CPU of this machine.
        folder: where engines are kept that the provider builds.
    """

    options: dict[str, str]
    fallback: bool
    here: bool
    folder: Path | None

    def __new__(
        cls,
        name: str = "cpu",
        options: Mapping[str, str] | None = None,
        *,
        fallback: bool = True,
        here: bool = True,
        folder: Path | None = None,
    ) -> Provider:
        made = super().__new__(cls, name)
        made.options = dict(options or {})
        made.fallback, made.here, made.folder = fallback, here, folder
        return made

    @classmethod
    def of(cls, name: str) -> Provider:
        """The same, also for a plain name."""
        return name if isinstance(name, cls) else cls(name)

    @property
    def short(self) -> str:
        """`cuda` for `CUDAExecutionProvider`; the full name of a provider that has no short one here."""
        names = PROVIDERS.items()
        return next((short for short, full in names if self.lower() in (short, full.lower())), str(self))

    @property
    def on_device(self) -> bool:
        """Whether tensors stay on a card between the runs that are timed."""
        return self.here and self.short in NVIDIA

    @property
    def captured(self) -> str | None:
        """The option that asks for CUDA graphs, when they are asked for."""
        return next((name for name in _CAPTURE if self.options.get(name, "0") not in _NO), None)

    def without_engines(self) -> Provider:
        """The same, but what it builds is not kept: thousands of fragments are timed, and their times are kept."""
        return Provider(self, self.options, fallback=self.fallback, here=self.here)

    def chain(self, purpose: Purpose) -> list[tuple[str, dict[str, str]]]:
        """Short names and options of the providers that a session opens with, the first choice first.

        Samples run on CUDA when the model is for TensorRT: no engine is worth building for a model that is read once.
        A captured graph reads the addresses that it was captured with, so only timed sessions have one.
        """
        if not self.here:
            return [("cpu", {})]
        options = {k: v for k, v in self.options.items() if purpose == "time" or k not in _CAPTURE}
        if self.short != "tensorrt":
            return [(self.short, options)]
        cuda = ("cuda", {"device_id": options["device_id"]} if "device_id" in options else {})
        return [cuda] if purpose == "samples" else [("tensorrt", {**self._engines(), **options}), cuda]

    def _engines(self) -> dict[str, str]:
        """Engines are built once: they and the timings of their tactics are kept."""
        if self.folder is None:
            return {}
        place = str(self.folder)
        kept = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": place}
        return {**kept, "trt_timing_cache_enable": "1", "trt_timing_cache_path": place}


def parse_options(given: Iterable[str]) -> dict[str, str]:
    """`k=v` words as a dict.

    Raises:
        SettingsError: a word of another form, or a key that is given twice.
    """
    found: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise SettingsError(f"--provider-option '{text}' is not of the form NAME=VALUE, such as use_tf32=0")
        if key in found:
            raise SettingsError(f"--provider-option {key} is given twice; give one value")
        found[key] = value
    return found


def checked_options(given: Mapping[str, Any]) -> dict[str, str]:
    """The options as the runtime wants them: strings.

    Raises:
        SettingsError: a value that is not a string, a number or a truth value.
    """
    for key, value in given.items():
        if not isinstance(value, str | int | float):
            raise SettingsError(f"provider option '{key}' is a {type(value).__name__}; give a string or a number")
    return {str(k): str(int(v)) if isinstance(v, bool) else str(v) for k, v in given.items()}
