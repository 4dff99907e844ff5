"""Providers with their options: what a session opens with, which libraries are missing, where nodes ran."""

from __future__ import annotations

import copy
import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from onnx_lowrank import gpu, libraries, providers
from onnx_lowrank.errors import RuntimeMissing, SettingsError
from onnx_lowrank.placement import placements, sentence
from onnx_lowrank.providers import Provider
from onnx_lowrank.runtime import Session, load
from onnx_lowrank.settings import Settings

CUDA = "CUDAExecutionProvider"


def test_a_provider_is_its_name_and_keeps_its_options() -> None:
    settings = Settings(provider="cuda", provider_options={"use_tf32": 0}, cpu_fallback=False)  # type: ignore[dict-item]
    again = dataclasses.replace(settings, threads=2).provider
    assert again == "cuda"
    assert json.dumps(again) == '"cuda"'
    kept = copy.deepcopy(Provider.of(again))
    assert (kept.options, kept.fallback, kept.here) == ({"use_tf32": "0"}, False, True)


def test_only_timed_sessions_capture_a_graph() -> None:
    chosen = Provider("cuda", {"enable_cuda_graph": "1", "use_tf32": "0"})
    assert chosen.captured == "enable_cuda_graph"
    assert chosen.chain("time") == [("cuda", {"enable_cuda_graph": "1", "use_tf32": "0"})]
    assert chosen.chain("samples") == chosen.chain("verify") == [("cuda", {"use_tf32": "0"})]


def test_engines_are_kept_and_not_built_for_samples() -> None:
    chosen = Provider("tensorrt", {"trt_fp16_enable": "1"}, folder=Path("cache/tensorrt"))
    assert chosen.chain("samples") == [("cuda", {})]
    (first, options), second = chosen.chain("verify")
    assert (first, second) == ("tensorrt", ("cuda", {}))
    assert options["trt_engine_cache_path"] == "cache/tensorrt"
    assert options["trt_fp16_enable"] == "1"
    (first, options), _ = chosen.without_engines().chain("time")
    assert (first, options) == ("tensorrt", {"trt_fp16_enable": "1"})
    given = Provider("tensorrt", {"trt_engine_cache_enable": "0"}, folder=Path("cache"))
    assert given.chain("time")[0][1]["trt_engine_cache_enable"] == "0"


def test_what_is_only_planned_for_runs_on_the_cpu() -> None:
    chosen = Settings(provider="cuda", verify_latency=False, cache=Path(__file__)).provider
    assert Provider.of(chosen).chain("time") == [("cpu", {})]
    assert not Provider.of(chosen).on_device


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"provider": "cpu", "provider_options": {"a": "1"}}, "takes no options"),
        ({"provider": "cuda", "provider_options": {"a": [1]}}, "is a list"),
        ({"cpu_fallback": False}, "give cuda or tensorrt"),
        ({"provider": "cude", "verify_latency": False}, "did you mean 'cuda'"),
        ({"provider": "cuda", "verify_latency": False, "speedup": 1.5}, "speedup is measured"),
        ({"provider": "cuda", "verify_latency": False, "require_speedup": 1.5}, "require_speedup is measured"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(choices: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        Settings.from_table(choices)


@pytest.mark.parametrize("words", [["use_tf32"], ["=1"], ["a=1", "a=2"]])
def test_options_of_another_form_are_refused(words: list[str]) -> None:
    with pytest.raises(SettingsError, match="--provider-option"):
        providers.parse_options(words)
    assert providers.parse_options(["path=a=b", "c="]) == {"path": "a=b", "c": ""}


def elf(names: list[str]) -> bytes:
    """The least shared library that asks for others: a header, a loaded and a dynamic segment, strings."""
    strings, places = b"\0", []
    for name in names:
        places.append(len(strings))
        strings += name.encode() + b"\0"
    dynamic, base = 64 + 2 * 56, 0x1000
    entries = [(5, base + dynamic + 16 * (len(names) + 2)), *((1, place) for place in places), (0, 0)]
    table = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    size = dynamic + len(table) + len(strings)
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    segments = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    segments += struct.pack("<IIQQQQQQ", 2, 6, dynamic, base + dynamic, base + dynamic, len(table), len(table), 8)
    return head + segments + table + strings


def test_missing_libraries_are_named_with_what_brings_them(tmp_path: Path) -> None:
    names = ["libcublasLt.so.13", "libcudart.so.13", "libcuda.so.1", "libnvinfer.so.10", "libm.so.6"]
    (tmp_path / "provider.so").write_bytes(elf(names))
    assert libraries.needed(tmp_path / "provider.so") == tuple(names)
    absent = libraries.missing(tmp_path / "provider.so", opens=lambda name: name == "libcudart.so.13")
    assert absent == ["libcublasLt.so.13", "libcuda.so.1", "libnvinfer.so.10"]
    assert libraries.explain(absent) == (
        "libcublasLt.so.13 (the CUDA libraries: pip install 'onnx-lowrank[cuda]'); libcuda.so.1 (the NVIDIA driver); "
        "libnvinfer.so.10 (TensorRT: pip install tensorrt)"
    )


def test_what_a_real_library_needs_is_read(tmp_path: Path) -> None:
    (library,) = (Path(load().__file__).parent / "capi").glob("onnxruntime_pybind11_state*.so")
    assert "libc.so.6" in libraries.needed(library)
    (tmp_path / "text").write_text("no library")
    (tmp_path / "empty").write_bytes(b"")
    assert libraries.needed(tmp_path / "text") == libraries.needed(tmp_path / "empty") == ()
    assert libraries.needed(tmp_path / "none") == ()


def test_a_provider_whose_libraries_are_missing_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Runtime:
        __file__ = str(tmp_path / "__init__.py")

    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(elf(["libcunothing.so.99"]))
    monkeypatch.setattr(libraries, "preload", lambda names: [])  # noqa: ARG005
    with pytest.raises(RuntimeMissing, match=r"provider 'cuda' cannot load: missing libcunothing\.so\.99 \(the CUDA"):
        libraries.prepare(Runtime, CUDA)


def test_libraries_of_packages_are_looked_for_on_the_whole_path(tmp_path: Path) -> None:
    folder = tmp_path / "nvidia" / "cudnn" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcudnn.so.9").write_text("no library")
    assert libraries.preload(["libcudnn.so.9", "libnone.so"], [str(tmp_path)]) == []  # found, but it cannot be opened


def event(name: str, op: str, provider: str, kinds: dict[str, list[int]], ms: float) -> dict[str, Any]:
    shapes = [{kind: shape} for kind, shape in kinds.items()]
    args = {"op_name": op, "provider": provider, "input_type_shape": shapes, "output_type_shape": shapes}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": ms * 1e3, "args": args}


def test_nodes_that_left_the_provider_are_named_with_the_reason() -> None:
    events = [
        event("a", "MatMul", CUDA, {"float": [8, 8]}, 1),
        event("b", "Gather", "CPUExecutionProvider", {"int64": [4]}, 0.1),
        event("c", "FooConv", "CPUExecutionProvider", {"float16": [1, 64]}, 5),
        event("c", "FooConv", "CPUExecutionProvider", {"float16": [1, 64]}, 4),
        event("d", "MemcpyToHost", CUDA, {"float": [1]}, 0.2),
        {"cat": "Session", "name": "model_run", "dur": 1},
    ]
    found = placements(events, CUDA)
    assert [(p.node, p.on, p.ms) for p in found] == [
        ("c", "CPUExecutionProvider", 4),
        ("d", CUDA, 0.2),
        ("b", "CPUExecutionProvider", 0.1),
    ]
    assert found[0].why == "CUDA has no kernel for it with these types and attributes (float16)"
    assert found[2].why == "shape arithmetic, which the runtime keeps on the CPU"
    assert sentence(found, "cuda") == (
        "2 nodes do not run on cuda (1 × FooConv: CUDA has no kernel for it with these types and attributes (float16); "
        "1 × Gather: shape arithmetic, which the runtime keeps on the CPU); 1 copies between host and device"
    )
    assert sentence(placements(events[:1], CUDA), "cuda") is None


def test_the_facts_of_a_card_are_read_from_one_line() -> None:
    line = "NVIDIA H100 80GB HBM3, 580.159.04, 1980, 1980, 2619, 33, 71.20, [N/A]\n"
    assert gpu.parsed(line) == {
        "name": "NVIDIA H100 80GB HBM3", "driver": "580.159.04", "sm_mhz": 1980.0, "sm_max_mhz": 1980.0,
        "memory_mhz": 2619.0, "celsius": 33.0, "watts": 71.2,
    }  # fmt: skip
    assert gpu.parsed("") == {}


def test_a_session_takes_a_provider_as_it_takes_a_name() -> None:
    import onnx.parser

    text = '<ir_version: 8, opset_import: ["" : 17]> f (float[2] x) => (float[2] y) { y = Neg(x) }'
    planned = Provider("cuda", {"use_tf32": "0"}, here=False)
    assert Session(onnx.parser.parse_model(text), provider=planned).output_names == ["y"]
