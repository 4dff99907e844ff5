"""com.microsoft FusedConv and FusedGemm, opened while a model is worked on, and closed where nothing touched them.

    before   x -[ FusedConv  W, b, z, activation, activation_params ]-> y
    opened   x -[ Conv  W, b ]- t -[ Add  z ]- u -[ activation  α, β ]-> y

    before   x -[ FusedGemm  W, b, activation, activation_alpha … ]-> y
    opened   x -[ Gemm  W, b ]- t -[ activation  α … ]-> y

So the linear part is a site like any other: its output can be seen, and an activation that follows it is fused again by
the runtime, into the last factor. Parameters are those that the runtime demands: it has no defaults for them.
Left alone: other activations, parameters that are missing, weights that are computed, bodies of If, Loop and Scan.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_lowrank.constants import Constants
from onnx_lowrank.files import ModelFile
from onnx_lowrank.protos import Opened, all_names, attribute, opset_of, unique_names
from onnx_lowrank.wellformed import is_sound

_CONV: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(("", "Relu", "Sigmoid", "Tanh"), ()),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}
_GEMM: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign"), ()),
    **dict.fromkeys(("LeakyRelu", "Elu", "ThresholdedRelu"), ("alpha",)),
    "HardSigmoid": ("alpha", "beta"),
    "Selu": ("alpha", "gamma"),
}
_FUSED: Final = {"FusedConv": ("Conv", _CONV), "FusedGemm": ("Gemm", _GEMM)}
_OWN: Final = ("activation", "activation_params", "activation_alpha", "activation_beta", "activation_gamma")
_BESIDE: Final = 3  # place of a tensor that is added before the activation
_CLIP_OF_INPUTS: Final = 11  # operator set


def open_fused(file: ModelFile) -> ModelFile:
    """The file with a ModelProto whose fused nodes are open; hash and size stay those of the file on disk."""
    constants = Constants(file.model, file.folder)
    names = _Names(all_names(file.model))
    nodes = list(file.model.graph.node)
    version = opset_of(file.model)
    found = [_opened(n, label, names, constants, version) for n, label in zip(nodes, unique_names(nodes), strict=True)]
    if not any(found):
        return file
    model = onnx.ModelProto()
    model.CopyFrom(file.model)
    del model.graph.node[:]
    for node, one in zip(nodes, found, strict=True):
        model.graph.node.extend([node] if one is None else one.nodes)
    return dataclasses.replace(file, model=model, opened=tuple(one for one in found if one is not None))


def close_fused(model: onnx.ModelProto, opened: tuple[Opened, ...]) -> onnx.ModelProto:
    """The model with every fused node back whose parts are all still there; it is changed in place."""
    left = {node.output[0]: node for node in model.graph.node if node.output}
    whole = [one for one in opened if all(left.get(part.output[0]) == part for part in one.nodes)]
    if not whole:
        return model
    last = {one.nodes[-1].output[0]: one.fused for one in whole}
    inner = {part.output[0] for one in whole for part in one.nodes[:-1]}
    nodes = [last.get(n.output[0], n) if n.output else n for n in model.graph.node if not inner.intersection(n.output)]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


class _Names:
    """Gives out names that a model does not have."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = taken

    def fresh(self, base: str) -> str:
        numbered = itertools.chain([base], (f"{base}_{i}" for i in itertools.count(1)))
        name = next(name for name in numbered if name not in self._taken)
        self._taken.add(name)
        return name


def _opened(node: onnx.NodeProto, label: str, names: _Names, constants: Constants, opset: int) -> Opened | None:
    known = _FUSED.get(node.op_type) if node.domain == "com.microsoft" else None
    if known is None or not is_sound(node):
        return None
    op, activations = known
    activation = attribute(node, "activation", b"").decode(errors="replace")
    values = _parameters(node, activations.get(activation))
    weight = constants.value(node.input[1])
    if values is None or weight is None:
        return None
    parts: list[tuple[str, list[str]]] = [(op, list(node.input[1:3]))]
    if len(node.input) > _BESIDE and node.input[_BESIDE]:
        parts.append(("Add", [node.input[_BESIDE]]))
    bounds: list[onnx.NodeProto] = []
    if activation == "Clip" and opset >= _CLIP_OF_INPUTS:
        bounds = [_scalar(names.fresh(f"{label}/{name}"), value, weight.dtype) for name, value in values.items()]
        values = {}
    if activation:
        parts.append((activation, [bound.output[0] for bound in bounds]))
    tensors = [*(names.fresh(f"{label}/{kind}") for kind, _ in parts[:-1]), node.output[0]]
    made, reads = list[onnx.NodeProto](), node.input[0]
    for (kind, operands), output in zip(parts, tensors, strict=True):
        name = names.fresh(f"{label}/{kind}") if made else label
        made.append(helper.make_node(kind, [reads, *operands], [output], name=name))
        reads = output
    made[0].attribute.extend(a for a in node.attribute if a.name not in _OWN)
    made[-1].attribute.extend(helper.make_attribute(name, value) for name, value in values.items())
    for part in made:
        part.metadata_props.extend(node.metadata_props)
    return Opened(node, (*bounds, *made))


def _parameters(node: onnx.NodeProto, wanted: tuple[str, ...] | None) -> dict[str, float] | None:
    """Parameters of the activation by name; None where it is unknown or they are not all there."""
    if wanted is None:
        return None
    if node.op_type == "FusedConv":
        listed = list(attribute(node, "activation_params", []))
    else:
        listed = [attribute(node, f"activation_{name}", None) for name in wanted]
    return None if len(listed) < len(wanted) or None in listed else dict(zip(wanted, listed, strict=False))


def _scalar(name: str, value: float, dtype: np.dtype[Any]) -> onnx.NodeProto:
    tensor = numpy_helper.from_array(np.asarray(value, dtype))
    return helper.make_node("Constant", [], [name], name=name, value=tensor)
