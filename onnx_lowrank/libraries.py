"""Shared libraries that an execution provider needs: which of them this system cannot load."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import mmap
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from onnx_lowrank.errors import RuntimeMissing
from onnx_lowrank.providers import PROVIDERS

_DYNAMIC, _STRINGS, _NEEDED, _LOAD = 2, 5, 1, 1
_HEADER: Final = struct.Struct("<16xHHIQQQIHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_ENTRY: Final = struct.Struct("<qQ")

_BROUGHT: Final = {
    "libcuda.": "the NVIDIA driver",
    "libnvinfer": "TensorRT: pip install tensorrt",
    "libnvonnxparser": "TensorRT: pip install tensorrt",
    "libcu": "the CUDA libraries: pip install 'onnx-lowrank[cuda]'",
    "libnv": "the CUDA libraries: pip install 'onnx-lowrank[cuda]'",
}
"""What brings a library, by the start of its name; the first that fits."""


def needed(library: Path) -> tuple[str, ...]:
    """Names of the libraries that a 64-bit little-endian ELF file asks for (DT_NEEDED); none for any other file."""
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return tuple(_needed(data))
    except (OSError, ValueError, struct.error):
        return ()


def _needed(data: mmap.mmap) -> Iterator[str]:
    if data[:6] != b"\x7fELF\x02\x01":
        return
    *_, start, _, _, _, size, count = _HEADER.unpack_from(data)
    segments = [_SEGMENT.unpack_from(data, start + size * i) for i in range(count)]
    loaded = [(address, length, offset) for kind, _, offset, address, _, length, _, _ in segments if kind == _LOAD]

    def at(address: int) -> int:
        return int(next(o + address - first for first, length, o in loaded if first <= address < first + length))

    for kind, _, offset, _, _, length, _, _ in segments:
        if kind == _DYNAMIC:
            entries = [_ENTRY.unpack_from(data, offset + i) for i in range(0, length, _ENTRY.size)]
            strings = next(at(value) for tag, value in entries if tag == _STRINGS)
            for value in (value for tag, value in entries if tag == _NEEDED):
                yield data[strings + value : data.find(b"\0", strings + value)].decode()


def _opens(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def missing(library: Path, opens: Callable[[str], bool] = _opens) -> list[str]:
    """The libraries that `library` asks for and that cannot be loaded.

    Args:
        opens: whether a library of this name can be loaded.
    """
    return [name for name in needed(library) if name.startswith(("libcu", "libnv")) and not opens(name)]


def explain(names: Iterable[str]) -> str:
    """`libcublas.so.13, libcudart.so.13 (the CUDA libraries: …); libcuda.so.1 (the NVIDIA driver)`."""
    by_source: dict[str, list[str]] = {}
    for name in names:
        source = next((text for start, text in _BROUGHT.items() if name.startswith(start)), "")
        by_source.setdefault(source, []).append(name)
    return "; ".join(", ".join(found) + (f" ({source})" if source else "") for source, found in by_source.items())


def preload(names: Iterable[str], places: Iterable[str] | None = None) -> list[str]:
    """Load libraries of NVIDIA's Python packages, wherever on the path these are; the names that were found.

    ONNX Runtime looks only beside its own folder, so that a `--target` folder or a second site of packages hides them.

    Args:
        names: as asked for, such as `libcudnn.so.9`.
        places: folders of packages; those of the Python path when None.
    """
    roots = [Path(place) / "nvidia" for place in (sys.path if places is None else places) if place]
    found = []
    for name in names:
        files = (f for root in roots if root.is_dir() for f in sorted(root.glob(f"*/lib/{name}")))
        if any(_opens(str(file)) for file in files):
            found.append(name)
    return found


@functools.cache
def prepare(ort: Any, full: str) -> None:
    """Load the libraries of a provider, once.

    Args:
        ort: the onnxruntime module.
        full: the provider's full name.

    Raises:
        RuntimeMissing: it names those that cannot be loaded, and what brings them.
    """
    short = {PROVIDERS[name]: name for name in ("cuda", "tensorrt")}.get(full)
    if short is None:
        return
    library = Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{short}.so"
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()
    preload([*missing(library), "libcudnn.so.9"])
    if absent := missing(library):
        raise RuntimeMissing(f"provider '{short}' cannot load: missing {explain(absent)}")
