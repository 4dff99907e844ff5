"""Models and fragments as they will be deployed: what is timed or verified goes through here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from onnx_lowrank import quantization
from onnx_lowrank.balance import (
    Spread,
    Thin,
    balance,
    correct_biases,
    mix,
    mixing,
    scaling,
    second_factor,
    thin_tensors,
)
from onnx_lowrank.normal import normal
from onnx_lowrank.quantization import OPSET, Range
from onnx_lowrank.ranges import by_channel, extremes
from onnx_lowrank.runtime import Feed
from onnx_lowrank.scheme import Scheme

_SITE = "onnx_lowrank.site"
_TIMED: Range = (-1.0, 1.0)  # of every tensor of a fragment that is timed: times do not depend on it


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What calibration says of the original's tensors: ranges by method of `Scheme.ranges`, means of inputs by channel.

    `known` are all its tensors, those too that are no floats.
    """

    ranges: Mapping[str, Mapping[str, Range]]
    means: Mapping[str, npt.NDArray[np.float64]]
    known: frozenset[str]


class Lowering:
    """Makes models of a precision out of float32 ones, original or rewritten.

    Args:
        scheme: how.
        folder: where external data lies.
        provider: runs the calibration.
        samples: a few calibration samples, for the ranges of what a rewrite adds.
        statistics: of the original's tensors, for int8.
    """

    def __init__(
        self,
        scheme: Scheme,
        folder: Path,
        provider: str,
        samples: Sequence[Feed] = (),
        statistics: Statistics | None = None,
    ) -> None:
        self.scheme, self._folder, self._provider = scheme, folder, provider
        self._samples, self._statistics = samples, statistics

    def using(self, **changes: Any) -> Lowering:
        """The same with another scheme."""
        scheme = dataclasses.replace(self.scheme, **changes)
        return Lowering(scheme, self._folder, self._provider, self._samples, self._statistics)

    def model(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A whole model in the precision; its weights are inside.

        Raises:
            ModelError: the converter cannot work on it.
        """
        if self.scheme.precision == "fp16":
            return quantization.half(normal(model, self._folder))
        plain = normal(model, self._folder, OPSET)
        exclude = _named(plain.graph, self.scheme.exclude)
        if self.scheme.method == "dynamic":
            return quantization.dynamic(plain, self._floats(plain.graph), exclude=exclude)
        ranges = self._balanced(plain, exclude)
        return quantization.static(plain, ranges, exclude=exclude, linear_only=self.scheme.linear_only)

    def _floats(self, graph: onnx.GraphProto) -> set[str]:
        """The original's tensors that are floats, and all that a rewrite adds, which are floats too."""
        assert self._statistics is not None
        known = self._statistics
        return {name for name in _made(graph) if name in known.ranges["extremes"] or name not in known.known}

    def _balanced(self, plain: onnx.ModelProto, exclude: frozenset[str]) -> dict[str, Range]:
        """Balance the factors of a model in place, correct its biases, and say the range of every tensor."""
        assert self._statistics is not None
        ranges, means = dict(self._statistics.ranges[self.scheme.ranges]), dict(self._statistics.means)
        new = [name for name in _made(plain.graph) if name not in self._statistics.known]
        pairs = [t for t in thin_tensors(plain.graph) if t.tensor in set(new)]
        pairs = [t for t in pairs if exclude.isdisjoint((plain.graph.node[t.down].name, plain.graph.node[t.up].name))]
        axes = {t.tensor: t.axis for t in pairs}
        rest = [name for name in new if name not in axes]
        ranges |= extremes(plain, self._folder, self._samples, rest, self._provider)
        channels = self._mixed(plain, pairs, axes)
        for thin in pairs:
            found = channels[thin.tensor]
            scale, centre, _ = scaling(thin, second_factor(plain.graph, thin), found)
            balance(plain.graph, thin, scale, centre)
            channels[thin.tensor] = _scaled(found, scale, centre)
        for name, found in channels.items():
            ranges[name] = (float(found.low.min()), float(found.high.max()))
            means[name] = found.mean
        if self.scheme.biases:
            correct_biases(plain.graph, means)
        return ranges

    def _mixed(self, plain: onnx.ModelProto, pairs: Sequence[Thin], axes: Mapping[str, int]) -> dict[str, Spread]:
        """Mix the channels of the tensors where that leaves less noise, in place; the spread of all channels then."""

        def spreads(model: onnx.ModelProto) -> dict[str, Spread]:
            return by_channel(model, self._folder, self._samples, axes, self._provider)

        def noise(thin: Thin, found: Spread, mixed: npt.NDArray[Any] | None = None) -> float:
            second = second_factor(plain.graph, thin)
            if mixed is not None:
                second = np.einsum("nrt,rs->nst", second, np.linalg.inv(mixed))
            return scaling(thin, second, found)[2]

        found = spreads(plain)
        turns = [(t, turn) for t in pairs if (turn := mixing(second_factor(plain.graph, t))) is not None]
        if not turns:
            return found
        mixed = onnx.ModelProto()
        mixed.CopyFrom(plain)
        for thin, turn in turns:
            mix(mixed.graph, thin, turn)
        after = spreads(mixed)
        better = [(t, m) for t, m in turns if noise(t, after[t.tensor], m) < noise(t, found[t.tensor])]
        for thin, turn in better:
            mix(plain.graph, thin, turn)
            found[thin.tensor] = after[thin.tensor]
        return found

    def fragment(self, model: onnx.ModelProto, x: npt.NDArray[Any]) -> tuple[onnx.ModelProto, Feed]:
        """A fragment as it runs inside a model of the precision, and an input of it; `x` is its float input.

        In fp16 that may be several copies side by side, each with an input of its own.
        """
        names = [value.name for value in model.graph.input]
        if self.scheme.precision == "fp16":
            return quantization.half(model), dict.fromkeys(names, x)
        (name,) = names
        plain = normal(model, self._folder, OPSET)
        floats = [*_made(plain.graph), name]
        if self.scheme.method == "dynamic":
            return quantization.dynamic(plain, floats), {name: x}
        ranges = dict.fromkeys(floats, _TIMED)
        made = quantization.static(plain, ranges, linear_only=self.scheme.linear_only)
        return _in_bytes(made, x, name)


def _scaled(found: Spread, scale: npt.NDArray[Any], centre: npt.NDArray[Any]) -> Spread:
    low, high, mean = ((value - centre) / scale for value in (found.low, found.high, found.mean))
    return Spread(low, high, mean, (found.power - 2 * centre * found.mean + centre**2) / scale**2)


def _made(graph: onnx.GraphProto) -> list[str]:
    """Every tensor that a node makes."""
    return [name for node in graph.node for name in node.output if name]


def _named(graph: onnx.GraphProto, exclude: Sequence[str]) -> frozenset[str]:
    """Names of the nodes that are called so, or that were written for a site that is."""
    wanted = set(exclude)
    sites = {node.name: {p.value for p in node.metadata_props if p.key == _SITE} for node in graph.node}
    return frozenset(name for name, site in sites.items() if name in wanted or site & wanted)


def _in_bytes(model: onnx.ModelProto, x: npt.NDArray[Any], name: str) -> tuple[onnx.ModelProto, Feed]:
    """A quantised fragment that takes and gives bytes where it can, channels last where it is 4-D.

    The runtime keeps images with their channels last between quantised convolutions; transposed at both ends here,
    a fragment costs what it costs in the middle of a model.
    """
    graph = model.graph
    (out,) = (value.name for value in graph.output)
    first = next((n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == name), None)
    last = next((n for n in graph.node if n.op_type == "DequantizeLinear" and n.output[0] == out), None)
    gone = {n.output[0] for n in (first, last) if n is not None}
    nodes = [n for n in graph.node if not gone.intersection(n.output)]
    fed, given, shape, dtype = name, out, x.shape, onnx.TensorProto.FLOAT
    if first is not None:
        fed, dtype = first.output[0], onnx.TensorProto.UINT8
    if last is not None:
        given = last.input[0]
    if x.ndim == 4:
        inner, outer, shape = fed, given, (x.shape[0], *x.shape[2:], x.shape[1])
        fed, given = f"{inner}/last", f"{outer}/last"
        nodes.insert(0, helper.make_node("Transpose", [fed], [inner], perm=[0, 3, 1, 2], name="to channels"))
        nodes.append(helper.make_node("Transpose", [outer], [given], perm=[0, 2, 3, 1], name="from channels"))
    inputs = [helper.make_tensor_value_info(fed, dtype, shape)]
    bytes_ = helper.make_graph(nodes, "fragment", inputs, [onnx.ValueInfoProto(name=given)], list(graph.initializer))
    made = helper.make_model(bytes_, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    if first is None:
        return made, {fed: np.moveaxis(x, 1, -1).copy() if x.ndim == 4 else x}
    return made, {fed: np.random.default_rng(0).integers(0, 255, shape, np.uint8)}
