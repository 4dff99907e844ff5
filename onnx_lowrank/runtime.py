"""ONNX Runtime, fenced: the only module that imports it, and it does so lazily."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lowrank import libraries
from onnx_lowrank.binding import Bound
from onnx_lowrank.errors import ModelError, RuntimeMissing, SettingsError
from onnx_lowrank.events import NUMBERED, kernel_times, node_runs
from onnx_lowrank.events import NodeRun as NodeRun
from onnx_lowrank.heft import is_mapped
from onnx_lowrank.linked import followed
from onnx_lowrank.protos import needed_for
from onnx_lowrank.providers import PROVIDERS, Provider, Purpose
from onnx_lowrank.scratch import scratch
from onnx_lowrank.settings import suggestion

Feed = Mapping[str, npt.NDArray[Any]]

_TYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16",
    "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
    "tensor(bool)": "bool", "tensor(string)": "object",
}  # fmt: skip

_ESCAPES = (
    "a data file is a link that leads out of the model's folder, and ONNX Runtime does not follow it; put the data "
    "itself, or a hard link to it, beside the model"
)


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
    onnxruntime.set_default_logger_severity(4)  # it writes of missing libraries and of options that are merely set
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
    full = PROVIDERS.get(provider.lower(), str(provider))
    if full in available:
        return full
    if full in PROVIDERS.values():
        here = ", ".join(short for short, long in PROVIDERS.items() if long in available)
        raise RuntimeMissing(f"provider '{provider}': this ONNX Runtime has only {here}; install the build that has it")
    raise SettingsError(f"no execution provider is called '{provider}'{suggestion(provider, PROVIDERS)}")


class Session:
    """A model that is ready to run on one execution provider.

    Args:
        model: path of a file, or a ModelProto (its external data is looked for in `folder`; that of a file beside it).
        provider: a name, or a `Provider` with its options.
        threads: intra-op threads; 0 is the runtime's own choice.
        optimisations: of the graph, as the runtime calls its levels: `disable_all`, `basic`, `extended`, `all`.
        prepack: False uses weights in data files where they lie instead of packing copies of them; never for timing.
            None does so for models that are heavy, when `spin` is False.
        spin: let waiting threads burn their core, as the runtime does by default; for timing. On a machine that others
            use too it slows everybody down.
        purpose: what it is for: options of the provider that only timed runs bear, and engines that take long to
            build, are left out where they serve nothing.

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
        optimisations: str = "all",
        prepack: bool | None = None,
        spin: bool = False,
        profile_to: str | None = None,
        purpose: Purpose = "samples",
    ) -> None:
        self._ort = ort = load()
        self._provider = Provider.of(provider)
        chain = [(provider_name(name), given) for name, given in self._provider.chain(purpose)]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        level = f"ORT_{'' if optimisations == 'disable_all' else 'ENABLE_'}{optimisations.upper()}"
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        if not (spin or not is_mapped(model) if prepack is None else prepack):
            options.add_session_config_entry("session.disable_prepacking", "1")
        if not spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if folder is not None and not isinstance(model, Path):  # a file has its data in its own folder
            model, folder = followed(model, folder)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if profile_to is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile_to
        if not self._provider.fallback and purpose != "samples" and chain[0][0] != PROVIDERS["cpu"]:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        self._open(model, options, chain)
        outputs = self._session.get_outputs()
        self.output_names: list[str] = [o.name for o in outputs]
        self._tensors = all(o.type.startswith("tensor(") for o in outputs)

    def _open(self, model: Path | onnx.ModelProto, options: Any, chain: list[tuple[str, dict[str, str]]]) -> None:
        for name, given in chain:
            libraries.prepare(self._ort, name)
            if "trt_engine_cache_path" in given:
                Path(given["trt_engine_cache_path"]).mkdir(parents=True, exist_ok=True)
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        try:
            self._session = self._ort.InferenceSession(source, options, providers=chain, enable_fallback=0)
        except Exception as fault:  # the runtime's exceptions share no base class
            where = str(model) if isinstance(model, Path) else "the model"
            if "escapes model directory" in str(fault):
                raise ModelError(f"{where}: {_ESCAPES}") from None
            raise ModelError(f"{where}: ONNX Runtime cannot load it: {_one_line(fault)}") from None
        if hasattr(self._session, "_model_bytes"):  # kept to open it once more, which is never done here
            self._session._model_bytes = None
        if chain[0][0] not in self._session.get_providers():
            raise RuntimeMissing(
                f"provider '{self._provider}' did not load: the runtime fell back to "
                f"{self._session.get_providers()[0]}; check the card (nvidia-smi) and the options of the provider"
            )

    def bound(self, feed: Feed) -> Bound:
        """One run of this feed, with inputs and outputs resident on the provider's device; call it to run.

        Raises:
            ModelError: a value that cannot be bound.
        """
        device = ("cuda", int(self._provider.options.get("device_id", 0))) if self._provider.on_device else ("cpu", 0)
        try:
            return Bound(self._ort, self._session, feed, self.output_names, device)
        except Exception as fault:
            raise ModelError(f"the inputs cannot be bound: {_one_line(fault)}") from None

    def timed(self, feed: Feed) -> Callable[[], object]:
        """What a timing calls: a bound run where tensors live on a card, else a plain one."""
        plain = not self._tensors or any(array.dtype.kind in "OUS" for array in feed.values())
        return functools.partial(self.run, feed) if plain or not self._provider.on_device else self.bound(feed)

    def inputs(self) -> list[tuple[str, np.dtype[Any], tuple[int | str | None, ...]]]:
        """Name, dtype and shape of every required input.

        Raises:
            ModelError: an input that is not a tensor, so that no sample can be made for it.
        """
        found = []
        for entry in self._session.get_inputs():
            if entry.type not in _TYPES:
                raise ModelError(
                    f"input '{entry.name}' is a {entry.type}; only tensors of numbers, booleans and strings can be fed"
                )
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
        node.name = f"{NUMBERED}{position}"
    with scratch() as place:
        prefix = str(place / "profile")
        session = Session(named, folder=folder, optimisations="disable_all", prepack=False, profile_to=prefix)
        session.run(feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    return node_runs(events)


def node_times(
    model: onnx.ModelProto, feed: Feed, folder: Path, *, provider: str, threads: int, runs: int = 7
) -> dict[str, float]:
    """Milliseconds of every node of the model as the runtime executes it, optimised; the least of some runs."""
    events = profiled(model, feed, folder, provider=provider, threads=threads, runs=runs + 1)
    return kernel_times(events, runs + 1)[0]


def profiled(
    model: Path | onnx.ModelProto, feed: Feed, folder: Path, *, provider: str, threads: int, runs: int
) -> list[dict[str, Any]]:
    """Events of the runtime's profile of some runs."""
    with scratch() as place:
        prefix = str(place / "profile")
        session = Session(
            model, provider=provider, threads=threads, folder=folder, spin=True, profile_to=prefix, purpose="verify"
        )
        for _ in range(runs):
            session.run(feed)
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    return events
