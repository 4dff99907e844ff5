"""ONNX Runtime, fenced: the only module that imports it, and it does so lazily."""

from __future__ import annotations

import importlib.metadata
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lowrank.errors import ModelError, RuntimeMissing, SettingsError
from onnx_lowrank.protos import needed_for
from onnx_lowrank.settings import suggestion

Feed = Mapping[str, npt.NDArray[Any]]

_PROFILED = "onnx_lowrank_node_"
_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "rocm": "ROCMExecutionProvider",
}
_TYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16",
    "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
    "tensor(bool)": "bool", "tensor(string)": "object",
}  # fmt: skip


@dataclass(frozen=True)
class NodeRun:
    """One node in a profiled run: shapes of its inputs and outputs, how often it ran, its time."""

    op: str
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    count: int
    ms: float


def load() -> Any:
    """The onnxruntime module.

    Raises:
        RuntimeMissing: not installed, or two of its packages overwrite each other.
    """
    try:
        import onnxruntime
    except ImportError as fault:
        if isinstance(fault.__cause__ or fault.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise RuntimeMissing(
            f"ONNX Runtime cannot be imported ({fault}); install one: pip install 'onnx-lowrank[cpu]' or '[gpu]'"
        ) from None
    if not hasattr(onnxruntime, "InferenceSession"):
        raise RuntimeMissing(
            "onnxruntime and onnxruntime-gpu overwrite each other here; pip uninstall both, then install one of them"
        )
    return onnxruntime


def version() -> str:
    """Version of ONNX Runtime, with the package that brought it."""
    ort = load()
    names = {d.metadata["Name"] for d in importlib.metadata.distributions() if d.metadata["Name"]}
    found = sorted(n for n in names if n.startswith("onnxruntime") and "extension" not in n)
    return f"{'+'.join(found) or 'onnxruntime'} {ort.__version__}"


def provider_name(provider: str) -> str:
    """Full name of an execution provider that this ONNX Runtime has.

    Raises:
        SettingsError: no such provider.
        RuntimeMissing: the provider exists, but this build of ONNX Runtime lacks it.
    """
    available = load().get_available_providers()
    full = _PROVIDERS.get(provider.lower(), provider)
    if full in available:
        return str(full)
    if full in _PROVIDERS.values():
        here = ", ".join(short for short, long in _PROVIDERS.items() if long in available)
        raise RuntimeMissing(f"provider '{provider}': this ONNX Runtime has only {here}; install the build that has it")
    raise SettingsError(f"no execution provider is called '{provider}'{suggestion(provider, _PROVIDERS)}")


class Session:
    """A model that is ready to run on one execution provider.

    Args:
        model: path of a file, or a ModelProto (its external data is looked for in `folder`).
        threads: intra-op threads; 0 is the runtime's own choice.
        optimize: graph optimisations of the runtime.
        prepack: False maps weights from disk instead of copying them; for calibration, never for timing.
        spin: let waiting threads burn their core, as the runtime does by default; for timing. On a machine that others
            use too it slows everybody down.

    Raises:
        ModelError: the runtime refuses the model.
        RuntimeMissing: the provider did not load.
    """

    def __init__(
        self,
        model: Path | onnx.ModelProto,
        *,
        provider: str = "cpu",
        threads: int = 1,
        folder: Path | None = None,
        optimize: bool = True,
        prepack: bool = True,
        spin: bool = False,
        profile_to: str | None = None,
    ) -> None:
        ort = load()
        wanted = provider_name(provider)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if not spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if profile_to is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile_to
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        try:
            self._session = ort.InferenceSession(source, options, providers=[wanted])
        except Exception as fault:  # the runtime's exceptions share no base class
            where = str(model) if isinstance(model, Path) else "the model"
            raise ModelError(f"{where}: ONNX Runtime cannot load it: {_one_line(fault)}") from None
        if wanted not in self._session.get_providers():
            raise RuntimeMissing(
                f"provider '{provider}' did not load: the runtime fell back to {self._session.get_providers()[0]}; "
                "check the driver and the CUDA libraries (extra `cuda`)"
            )
        self.output_names: list[str] = [o.name for o in self._session.get_outputs()]

    def inputs(self) -> list[tuple[str, np.dtype[Any], tuple[int | str | None, ...]]]:
        """Name, dtype and shape of every required input.

        Raises:
            ModelError: an input that is not a tensor, so that no sample can be made for it.
        """
        found = []
        for entry in self._session.get_inputs():
            if entry.type not in _TYPES:
                raise ModelError(f"input '{entry.name}' is a {entry.type}; only tensors can be fed from samples")
            found.append((entry.name, np.dtype(_TYPES[entry.type]), tuple(entry.shape)))
        return found

    def run(self, feed: Feed, names: Sequence[str] | None = None) -> list[Any]:
        """Outputs by name (all when None).

        Raises:
            ModelError: the model fails on this feed.
        """
        try:
            return list(self._session.run(names, dict(feed)))
        except Exception as fault:
            raise ModelError(f"the model fails on a sample: {_one_line(fault)}") from None

    def end_profiling(self) -> str:
        """Path of the profile that was written."""
        return str(self._session.end_profiling())


def _one_line(fault: Exception) -> str:
    return " ".join(str(fault).split())[:300]


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of the model whose only outputs are the named tensors (types are left to the runtime).

    Only the nodes and initializers that they need are left: the runtime would run all others too.
    """
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    graph = tapped.graph
    needed, read = needed_for(graph.node, names)
    for position in reversed(range(len(graph.node))):
        if position not in needed:
            del graph.node[position]
    for position in reversed(range(len(graph.initializer))):
        if graph.initializer[position].name not in read:
            del graph.initializer[position]
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return tapped


def profile(model: onnx.ModelProto, feed: Feed, *, folder: Path) -> dict[int, NodeRun]:
    """Run once without optimisations and read shapes, counts and times of the main graph's nodes by position.

    The only way that covers com.microsoft operators and dynamic shapes; `onnx.shape_inference` stops at the
    first operator that it does not know.
    """
    named = onnx.ModelProto()
    named.CopyFrom(model)
    for position, node in enumerate(named.graph.node):
        node.name = f"{_PROFILED}{position}"
    with tempfile.TemporaryDirectory() as scratch:
        prefix = os.path.join(scratch, "profile")  # noqa: PTH118  the runtime wants a string
        session = Session(named, folder=folder, optimize=False, prepack=False, profile_to=prefix)
        session.run(feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    return _node_runs(events)


def node_times(
    model: onnx.ModelProto, feed: Feed, folder: Path, *, provider: str, threads: int, runs: int = 7
) -> dict[str, float]:
    """Milliseconds of every node of the model as the runtime executes it, optimised; the median of some runs."""
    with tempfile.TemporaryDirectory() as scratch:
        prefix = os.path.join(scratch, "profile")  # noqa: PTH118  the runtime wants a string
        session = Session(model, provider=provider, threads=threads, folder=folder, spin=True, profile_to=prefix)
        for _ in range(runs + 1):
            session.run(feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[float]] = {}
    for event in events:
        name, found, suffix = event.get("name", "").rpartition("_kernel_time")
        if event.get("cat") == "Node" and found and not suffix:
            times.setdefault(name, []).append(event["dur"] / 1e3)
    return {name: float(np.median(ms[1:] or ms)) * len(ms) / (runs + 1) for name, ms in times.items()}


def _node_runs(events: list[dict[str, Any]]) -> dict[int, NodeRun]:
    found: dict[int, NodeRun] = {}
    for event in events:
        name, _, suffix = event.get("name", "").rpartition("_kernel_time")
        number = name.removeprefix(_PROFILED)
        if event.get("cat") != "Node" or suffix or number == name or not number.isdigit():
            continue  # a node of a body, or one that the runtime made (`…/duplicated`)
        position, args = int(number), event["args"]
        earlier = found.get(position)
        found[position] = NodeRun(
            op=args["op_name"],
            input_shapes=_shapes(args["input_type_shape"]),
            output_shapes=_shapes(args["output_type_shape"]),
            count=1 + (earlier.count if earlier else 0),
            ms=event["dur"] / 1e3 + (earlier.ms if earlier else 0.0),
        )
    return found


def _shapes(entries: list[dict[str, list[int]]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for entry in entries for shape in entry.values())
