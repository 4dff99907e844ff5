"""Reports of real models, as `optimize --report` writes them, with pictures: docs/gallery.

python tools/gallery.py ZOO_FOLDER docs/gallery [NAME …] [--pictures]

ZOO_FOLDER holds NAME.onnx and NAME.npz (`onnx-lowrank zoo get NAME`, `tools/zoo_build.py`). Every model goes through
the command line in a process of its own, with one thread, CPU provider and the default loss; NAME.html is what came out
and NAME.png its first screen (headless Chromium, playwright), one in the dark too. --pictures only draws the reports
that are there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

NAMES = ("silero_vad_16k_op15", "ppocr-det", "vgg16", "compare")
COMPARED = ("silero_vad", "silero_vad_16k_op15")
"""Two exports of one network by its authors, which take the same samples; beside them a file that is cut short."""

DARK = "vgg16"
_MOST_BYTES = 200_000


def report(zoo: Path, name: str, target: Path) -> None:
    """Run the command in a folder of its own, so that the page names no folder of this machine."""
    models = COMPARED if name == "compare" else (name,)
    words = ["optimize", f"{name}.onnx", "-o", f"{name}-lr.onnx"]
    if name == "compare":
        words = ["compare", *(f"{model}.onnx" for model in models), "cut-short.onnx"]
    with tempfile.TemporaryDirectory() as scratch:
        for file in (*(f"{model}.onnx" for model in models), f"{models[0]}.npz"):
            Path(scratch, file).symlink_to((zoo / file).resolve())
        Path(scratch, "cut-short.onnx").write_bytes((zoo / f"{models[0]}.onnx").read_bytes()[:100_000])
        command = [sys.executable, "-m", "onnx_lowrank", *words, "--data", f"{models[0]}.npz"]
        subprocess.run([*command, "--report", f"{name}.html"], cwd=scratch, check=True)
        shutil.copy(Path(scratch, f"{name}.html"), target)


def picture(page_file: Path, *, dark: bool = False) -> None:
    """The first screen of a page as a PNG of at most 200 kB beside it."""
    from playwright.sync_api import sync_playwright

    browser_path = next(found for name in ("chromium", "chromium-browser") if (found := shutil.which(name)))
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        scheme: Literal["dark", "light"] = "dark" if dark else "light"
        size = {"width": 1280, "height": 1000}
        page = browser.new_context(viewport=size, offline=True, color_scheme=scheme).new_page()
        page.goto(page_file.resolve().as_uri())
        picture_file = page_file.with_suffix(".dark.png" if dark else ".png")
        page.screenshot(path=picture_file)
        browser.close()
    found = picture_file.stat().st_size
    if found > _MOST_BYTES:
        raise SystemExit(f"{picture_file} has {found} bytes, more than {_MOST_BYTES}")


def main() -> None:
    """Make the reports and their pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--pictures", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names:
        target = given.out / f"{name}.html"
        if not given.pictures:
            report(given.zoo, name, target)
        picture(target)
        if name == DARK:
            picture(target, dark=True)
        print(target, flush=True)


if __name__ == "__main__":
    main()
