"""The parts of tools/gpu_suite.py: each yields the names of its items with what measures them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import random_models

from onnx_lowrank import measure, synthetic
from onnx_lowrank.candidates import adaptive_times
from onnx_lowrank.hardware import card
from onnx_lowrank.inputs import InputSpec
from onnx_lowrank.latency import CONTROL, DENSE, LatencyTable
from onnx_lowrank.passes import KINDS
from onnx_lowrank.placement import placed
from onnx_lowrank.providers import NVIDIA, Provider
from onnx_lowrank.runtime import Session, load, version
from onnx_lowrank.sites import Geometry
from onnx_lowrank.staircase import rank_grid, steps

Items = Iterator[tuple[str, Callable[[], Any]]]

ZOO = ("craft", "vgg16", "minilm", "efficientnet", "smollm")
CONVS = ((64, 64, 3, 56), (256, 64, 1, 56), (128, 128, 3, 28), (256, 256, 3, 14), (512, 512, 3, 28), (2048, 512, 1, 7))
"""Outputs, inputs, kernel and image size of convolutions of ResNet-50 and VGG-16."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """What is measured, where its files go, and whether only to see that it runs."""

    provider: Provider
    out: Path
    zoo: Path | None
    dry: bool

    @property
    def models(self) -> dict[str, Path]:
        """Random models, and those of the zoo that are there."""
        names = {name: self.out / "models" / f"{name}.onnx" for name in random_models.MODELS}
        found = {name: self.zoo / f"{name}.onnx" for name in ZOO} if self.zoo else {}
        return names | {name: path for name, path in found.items() if path.exists()}

    def model(self, name: str, precision: str) -> Path:
        """A model in a precision: built or converted once, its inputs and outputs as they were."""
        path = self.models[name]
        if name in random_models.MODELS and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            random_models.MODELS[name](**(random_models.TINY[name] if self.dry else {})).save(path)
        if precision == "fp32":
            return path
        half = self.out / "models" / f"{name}-{precision}.onnx"
        if not half.exists():
            half.parent.mkdir(parents=True, exist_ok=True)
            from onnxruntime.transformers.float16 import convert_float_to_float16

            with contextlib.redirect_stdout(io.StringIO()):
                onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), half)
        return half

    def data(self, name: str, count: int) -> Any:
        """Samples: those of the zoo, or synthetic ones of a batch of one."""
        if name not in random_models.MODELS:
            return str(self.models[name].with_suffix(".npz"))
        specs = [InputSpec(*entry) for entry in Session(self.model(name, "fp32")).inputs()]
        made = synthetic.samples(specs, synthetic.resolve_shapes(specs, self.shapes(name, 1)), 0)
        return [next(made) for _ in range(count)]

    def shapes(self, name: str, batch: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs of a batch."""
        if name in random_models.MODELS:
            return random_models.MODELS[name](**(random_models.TINY[name] if self.dry else {})).batch(batch)
        with np.load(self.models[name].with_suffix(".npz")) as samples:
            specs = {entry[0]: entry[2] for entry in Session(self.models[name]).inputs()}
            own = {k: a.shape[1:] if len(a.shape) > len(specs[k]) else (1, *a.shape[1:]) for k, a in samples.items()}
        return {name: (batch, *shape[1:]) for name, shape in own.items()}


def opens(suite: Suite) -> None:
    """Open the smallest model on the provider.

    Raises:
        LowRankError: it does not load; the message names what is missing.
    """
    built = random_models.MODELS["resnet50"](**random_models.TINY["resnet50"])
    Session(built.net.model(built.inputs, built.output, built.width, 0), provider=suite.provider)


def providers(suite: Suite) -> Items:
    """Whether the provider works at all, and how."""

    def libraries() -> dict[str, Any]:
        ort = load()
        found = {"runtime": version(), "available": ort.get_available_providers()}
        return {**found, "cuda": getattr(ort, "cuda_version", None), **card(suite.provider)}

    def binding() -> dict[str, Any]:
        path, feed = suite.model("resnet50", "fp32"), suite.data("resnet50", 1)[0]
        session = Session(path, provider=suite.provider)
        bound = session.bound(feed)
        bound()
        bound()
        same = all(np.array_equal(a, b) for a, b in zip(bound.outputs(), session.run(feed), strict=True))
        return {"equal": same, "devices": sorted({d for d, _ in bound.places()}), "transfers": bound.transfers()}

    def option(name: str, values: tuple[str, ...]) -> dict[str, Any]:
        path, feed = suite.model("bert-base", "fp32"), suite.data("bert-base", 1)[0]
        found, first = {}, None
        for value in values:
            chosen = Provider(suite.provider, {**suite.provider.options, name: value}, folder=suite.provider.folder)
            ready = measure.opened(path, feed, provider=chosen, threads=1, folder=None)
            ready.run()
            outputs = ready.run.outputs()
            latency = measure.race([path, path], feed, provider=chosen, threads=1, seed=0, seconds=3.0)[0]
            first = outputs if first is None else first
            found[value] = {**latency.before, "difference": difference(first, outputs)}
        return found

    def marked() -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        tests = Path(__file__).resolve().parent.parent / "tests" / "test_gpu.py"
        done = subprocess.run([*command, str(tests)], capture_output=True, text=True, check=False)
        return {"exit": done.returncode, "tail": done.stdout.strip().splitlines()[-12:]}

    yield "libraries", libraries
    yield "binding", binding
    if suite.provider.short in NVIDIA:
        yield "CUDA graphs", functools.partial(option, "enable_cuda_graph", ("0", "1"))
        yield "TF32", functools.partial(option, "use_tf32", ("0", "1"))
        yield "tensorrt", functools.partial(tensorrt, suite)
    if importlib.util.find_spec("pytest") and not suite.dry:
        yield "tests", marked


def tensorrt(suite: Suite) -> dict[str, Any]:
    """Milliseconds to build the engines of a model, and to load them when they are kept."""
    path, feed = suite.model("resnet50", "fp32"), suite.data("resnet50", 1)[0]
    chosen = Provider("tensorrt", folder=suite.out / "tensorrt")
    first, second = (measure.opened(path, feed, provider=chosen, threads=1, folder=None) for _ in range(2))
    return {
        name: {"load_ms": one.load_ms, "first_run_ms": one.first_run_ms}
        for name, one in (("built", first), ("kept", second))
    }


def difference(first: list[Any], other: list[Any]) -> float:
    """Relative squared difference of outputs, the largest of them."""
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(first, other, strict=True)]
    return max(float(((a - b) ** 2).sum() / max((a**2).sum(), 1e-30)) for a, b in pairs)


def correctness(suite: Suite) -> Items:
    """Outputs of the provider against the CPU in fp32, and the nodes that left the provider."""

    def compare(name: str, precision: str) -> dict[str, Any]:
        path, data = suite.model(name, precision), suite.data(name, 1)
        if isinstance(data, str):
            with np.load(data) as samples:
                specs = {entry[0]: entry[2] for entry in Session(suite.models[name]).inputs()}
                data = [{k: a[0] if a.ndim > len(specs[k]) else a[:1] for k, a in samples.items()}]
        expected = Session(suite.model(name, "fp32"), threads=0).run(data[0])
        found = Session(path, provider=suite.provider, threads=0, purpose="verify").run(data[0])
        left = placed(path, data[0], path.parent, provider=suite.provider)
        return {"difference": difference(expected, found), "fallback": [p.to_dict() for p in left[:50]]}

    for name in suite.models:
        for precision in ("fp32", "fp16"):
            yield f"{name} {precision}", functools.partial(compare, name, precision)


def geometries(suite: Suite) -> dict[str, Geometry]:
    """Sites of the models' kinds: projections and MLPs of BERT-base, convolutions of ResNet-50 and VGG-16."""

    def matmul(n: int, k: int, rows: int) -> Geometry:
        return Geometry("MatMul", n, k, "float32", True, 17, x_shape=(rows, k))

    def conv(n: int, c: int, kernel: int, batch: int, size: int) -> Geometry:
        pads = ((kernel - 1) // 2,) * 4
        return Geometry(
            "Conv", n, c * kernel * kernel, "float32", True, 17, channels=c, kernel=(kernel, kernel), strides=(1, 1),
            dilations=(1, 1), pads=pads, then="Relu", x_shape=(batch, c, size, size),
        )  # fmt: skip

    if suite.dry:
        return {"MatMul 64x64 8": matmul(64, 64, 8), "Conv 32x32 3x3 8": conv(32, 32, 3, 1, 8)}
    found = {f"MatMul {n}x{k} {rows}": matmul(n, k, rows)
             for n, k in ((768, 768), (3072, 768), (768, 3072), (4096, 4096)) for rows in (128, 4096)}  # fmt: skip
    for n, c, kernel, size in CONVS:
        found |= {f"Conv {n}x{c} {kernel}x{kernel} {size} b{b}": conv(n, c, kernel, b, size) for b in (1, 32)}
    return found


def typed(geometry: Geometry, dtype: str) -> Geometry:
    """The same in another type; ONNX has convolutions in bfloat16 from operator set 22 on."""
    return dataclasses.replace(geometry, dtype=dtype, opset=22 if dtype == "bfloat16" else geometry.opset)


def staircases(suite: Suite) -> Items:
    """Milliseconds by rank, the edges, and the multiple that the hardware rewards."""
    kinds = {kind.name: kind for kind in KINDS if kind.name in ("svd", "pivot", "conv_svd", "spatial")}

    def measured(geometry: Geometry, options: dict[str, str]) -> dict[str, Any]:
        provider = Provider(suite.provider, {**suite.provider.options, **options}, folder=suite.provider.folder)
        table = LatencyTable(suite.out / "tables", provider=provider, threads=1)
        applying = {name: kind for name, kind in kinds.items() if kind.applies(geometry) and kind.max_rank(geometry)}
        sizes = {name: {(r, 0) for r in rank_grid(k.max_rank(geometry), 12)} for name, k in applying.items()}
        times = adaptive_times((geometry,), sizes, kinds, table)
        table.save()
        row = table.rows([geometry])[geometry.key()]
        noise, by_kind = table.noise(geometry), {}
        for name, tried in sizes.items():
            by_kind[name] = steps({r: times[f"{name} {r}"] for r, _ in tried if f"{name} {r}" in times}, noise)
        return {"geometry": geometry.key(), "noise": noise, "dense_ms": row[DENSE], "again_ms": row.get(CONTROL),
                "kinds": by_kind, "ms": row}  # fmt: skip

    precisions: dict[str, tuple[str, dict[str, str]]] = {"fp32": ("float32", {})}
    if suite.provider.short in NVIDIA:
        precisions = {"fp32 tf32 off": ("float32", {"use_tf32": "0"}), "fp32 tf32 on": ("float32", {"use_tf32": "1"})}
    if not suite.dry:
        precisions |= {"fp16": ("float16", {}), "bf16": ("bfloat16", {})}
    for label, (dtype, options) in precisions.items():
        for name, geometry in geometries(suite).items():
            yield f"{label} {name}", functools.partial(measured, typed(geometry, dtype), options)
