"""The shape of the source tree: layers, sizes, the built wheel, links of the documents."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDERS: Final = ("onnx_lowrank", "passes", "models")

LEVELS: Final[dict[str, int]] = {
    # what everything may use
    "errors": 0,
    "providers": 0,
    "settings": 0,
    # arrays and values
    "alternating": 1,
    "branching": 1,
    "evidence": 1,
    "grouping": 1,
    "labels": 1,
    "linalg": 1,
    "memory": 1,
    "moments": 1,
    "narrow": 1,
    "projection": 1,
    "noise": 1,
    "patches": 1,
    "rectified": 1,
    "regression": 1,
    "scales": 1,
    "separable": 1,
    "sites": 1,
    "timing": 1,
    "sessions": 1,
    # what decides
    "allocate": 2,
    "blame": 2,
    "families": 2,
    "fragment": 2,
    "knapsack": 2,
    "ladders": 2,
    "plan": 2,
    "scheme": 2,
    "policies": 2,
    "search": 2,
    "staircase": 2,
    # what knows onnx, GraphSurgeon, the runtime
    "binding": 3,
    "borders": 3,
    "branches": 3,
    "balance": 3,
    "constants": 3,
    "events": 3,
    "files": 3,
    "fragments": 3,
    "functions": 3,
    "fused": 3,
    "gpu": 3,
    "graph": 3,
    "heft": 3,
    "libraries": 3,
    "linked": 3,
    "loops": 3,
    "placement": 3,
    "normal": 3,
    "protos": 3,
    "publishing": 3,
    "quantization": 3,
    "runtime": 3,
    "saving": 3,
    "scratch": 3,
    "stale": 3,
    "tensors": 3,
    "unknown": 3,
    "values": 3,
    "wellformed": 3,
    # what measures
    "attention": 4,
    "cache": 4,
    "calibration": 4,
    "chains": 4,
    "conditions": 4,
    "consumers": 4,
    "data": 4,
    "heads": 4,
    "importance": 4,
    "input_moments": 4,
    "inputs": 4,
    "latency": 4,
    "loaders": 4,
    "measure": 4,
    "metrics": 4,
    "resume": 4,
    "polish": 4,
    "precision": 4,
    "ranges": 4,
    "sensitivity": 4,
    "synthetic": 4,
    "tables": 4,
    "validation": 4,
    "vocabulary": 4,
    "accuracy": 4,
    "footprint": 4,
    "profiles": 4,
    "streams": 4,
    # one rewrite a file
    "passes": 5,
    "passes.absorb": 5,
    "passes.asym3d": 5,
    "passes.branch": 5,
    "passes.conv_svd": 5,
    "passes.dense": 5,
    "passes.fold": 5,
    "passes.linear": 5,
    "passes.merge": 5,
    "passes.nystrom": 5,
    "passes.pivot": 5,
    "passes.shared": 5,
    "passes.spatial": 5,
    "passes.survey": 5,
    "passes.tie": 5,
    "passes.svd": 5,
    "passes.transposed": 5,
    "passes.tucker": 5,
    # what drives them
    "candidates": 6,
    "columns": 6,
    "compare": 6,
    "guard": 6,
    "hardware": 6,
    "insitu": 6,
    "layers": 6,
    "merging": 6,
    "mixed": 6,
    "sharing": 6,
    "outcome": 6,
    "pipeline": 6,
    "planning": 6,
    "witness": 6,
    "prediction": 6,
    "fitting": 6,
    "input_fits": 6,
    "prepare": 6,
    "probe": 6,
    "probing": 6,
    "reached": 6,
    "refit": 6,
    "repair": 6,
    "report": 6,
    "rewrite": 6,
    "run": 6,
    "stages": 6,
    "verify": 6,
    "weighing": 6,
    "schemes": 6,
    "wholes": 6,
    "contest": 6,
    "details": 6,
    "examine": 6,
    # facade, views, zoo
    "": 7,
    "charts": 7,
    "figures": 7,
    "fourways": 7,
    "estimates": 7,
    "html": 7,
    "markdown": 7,
    "models": 7,
    "models.catalogue": 7,
    "models.drawing": 7,
    "models.get": 7,
    "models.inputs": 7,
    "models.packages": 7,
    "models.photos": 7,
    "models.speech": 7,
    "models.text": 7,
    "output": 7,
    "svg": 7,
    "terminal": 7,
    "timings": 7,
    "tradeoffs": 7,
    "verdicts": 7,
    "views": 7,
    "breakdowns": 7,
    "partcharts": 7,
    "regressions": 7,
    "samples": 7,
    "sidebyside": 7,
    "grids": 7,
    "sitelines": 7,
    # the command line
    "__main__": 8,
    "cli": 8,
    "commands": 8,
    "options": 8,
}
"""Every module without its `onnx_lowrank.`; '' is the facade."""

SHARED_BY_PASSES: Final = {
    "passes.linear": {"passes.dense", "passes.nystrom", "passes.pivot", "passes.shared", "passes.svd"},
    "passes.svd": {"passes", "passes.conv_svd"},
    "passes.dense": {"passes.merge"},
    "passes.fold": {"passes.absorb", "passes.merge", "passes.survey", "passes.transposed"},
    "passes.tie": {"passes.survey"},
    "passes.asym3d": {"passes"},
    "passes.branch": {"passes"},
    "passes.conv_svd": {"passes"},
    "passes.pivot": {"passes"},
    "passes.spatial": {"passes", "passes.asym3d"},
    "passes.transposed": {"passes.dense", "passes.survey", "passes.svd"},
    "passes.tucker": {"passes", "passes.branch"},
}
"""Which passes may import another one: the order in `passes`, and the few helpers that are shared."""

IMPORTERS: Final = {
    "onnx_graphsurgeon": {"graph"},
    "onnxruntime": {"quantization", "runtime"},
    "click": {"cli", "commands", "options"},
    "tempfile": {"models.get", "models.photos", "models.text", "scratch", "tables"},
}
"""The fence around each foreign library, and around temporary folders that a killed run would leave behind."""


TEMPLATES: Final = {p.relative_to(ROOT).as_posix() for p in (ROOT / "onnx_lowrank" / "templates").iterdir()}


def _sources() -> dict[str, Path]:
    """Files by module, without `onnx_lowrank.`; every file once, not through the links."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            parts = [] if folder == "onnx_lowrank" else [folder]
            found[".".join(parts + ([] if path.stem == "__init__" else [path.stem]))] = path
    return found


SOURCES: Final = _sources()


def _imports(module: str) -> Iterator[str]:
    """Full names of the modules that a module imports, lazily and for type checks too."""
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            assert node.module is not None
            yield from (_module_named(node.module, alias.name) for alias in node.names)


def _module_named(module: str, name: str) -> str:
    inside = f"{module}.{name}".removeprefix("onnx_lowrank.")
    return f"onnx_lowrank.{inside}" if module.startswith("onnx_lowrank") and inside in SOURCES else module


def _inner(module: str) -> set[str]:
    names = {name for name in _imports(module) if name.partition(".")[0] == "onnx_lowrank"}
    return {name.removeprefix("onnx_lowrank").removeprefix(".") for name in names}


def test_every_module_has_a_level() -> None:
    assert sorted(SOURCES) == sorted(LEVELS)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module: str) -> None:
    """A module imports from its own level or from below, lazily too."""
    upward = {name for name in _inner(module) if LEVELS[name] > LEVELS[module]}
    assert not upward, f"{module or 'onnx_lowrank'} (level {LEVELS[module]}) imports upward"


@pytest.mark.parametrize("module", [name for name in SOURCES if name.partition(".")[0] == "passes"])
def test_passes_stand_alone(module: str) -> None:
    """A pass neither reaches the runtime, not even through others, nor imports another pass beyond SHARED_BY_PASSES."""
    reached, queue = set[str](), [module]
    while queue:
        fresh = _inner(queue.pop()) - reached
        reached |= fresh
        queue += fresh
    assert "runtime" not in reached
    others = {name for name in _inner(module) if name.partition(".")[0] == "passes"}
    assert not {name for name in others if module not in SHARED_BY_PASSES.get(name, set())}


def test_only_the_command_line_imports_the_zoo() -> None:
    importers = {m for m in SOURCES for name in _inner(m) if name.partition(".")[0] == "models"}
    assert {name for name in importers if name.partition(".")[0] != "models"} <= {"commands"}


@pytest.mark.parametrize("library", IMPORTERS)
def test_each_library_stays_behind_its_fence(library: str) -> None:
    importers = {m for m in SOURCES for name in _imports(m) if name.partition(".")[0] == library}
    assert importers == IMPORTERS[library]


@pytest.mark.parametrize("module", SOURCES)
def test_sizes(module: str) -> None:
    """No file above 300 lines, no function above 50."""
    text = SOURCES[module].read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= 300
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not {f.name: n for f in functions if (n := (f.end_lineno or f.lineno) - f.lineno + 1) > 50}


def test_the_wheel_is_exactly_the_tree(tmp_path: Path) -> None:
    """Built through the source distribution, out of a copy: a `build/` left in the tree would leak into it."""
    copy = tmp_path / "copy"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*FOLDERS, "tests", "tools"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    tree = {p.relative_to(ROOT).as_posix() for p in SOURCES.values()}
    tree = {name if name.startswith("onnx_lowrank/") else f"onnx_lowrank/{name}" for name in tree}
    assert names - info == tree | {"onnx_lowrank/py.typed"} | TEMPLATES
    files = {name.partition("/")[2] for name in info}
    assert files == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}


def _documents() -> list[str]:
    return [p.relative_to(ROOT).as_posix() for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))]


@pytest.mark.parametrize("document", _documents())
def test_documents_refer_to_files_that_exist(document: str) -> None:
    """Relative links, and paths that are named from the root, such as `tools/test.sh`."""
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", link)]
    missing = [link for link in links if not (path.parent / link.partition("#")[0]).exists()]
    prose = re.sub(r"\]\([^)]*\)", "]", text)
    named = re.findall(r"(?<![\w/.-])(?:docs|tools|tests|passes|models|onnx_lowrank)/[\w./-]*\w", prose)
    assert not missing + [name for name in named if not (ROOT / name).exists()]


def test_importing_does_not_load_the_runtime() -> None:
    code = "import sys, onnx_lowrank as l; l.optimize, l.compare; assert 'onnxruntime' not in sys.modules"
    done = _python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["passes", "models"])
def test_mapped_folders_are_not_packages(name: str) -> None:
    done = _python(f"import {name}")
    assert done.returncode == 1
    assert f"ImportError: import onnx_lowrank.{name}, not {name}" in done.stderr


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
