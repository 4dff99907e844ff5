"""Constants of a model: weights followed to their data through nodes that turn, reshape or convert them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lowrank.protos import BORDER, attribute, evaluated, plain_constant
from onnx_lowrank.tensors import is_external, make_tensor, read_tensor

CONSTANT_OPS = ("Constant", "Identity", "Transpose", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze")
"""Operators through which a weight is followed to its data, which is their first input."""

_INPUTS = {"Constant": (0,), "Reshape": (2,), "Squeeze": (1, 2), "Unsqueeze": (1, 2)}
"""How many inputs they have, where it is not one."""


def is_constant_op(node: onnx.NodeProto) -> bool:
    """Whether a weight may be followed through this node; not over the border of an opened body."""
    followed = node.op_type in CONSTANT_OPS and node.domain in ("", "ai.onnx")
    return followed and not node.name.startswith(BORDER)


def _is_whole(node: onnx.NodeProto) -> bool:
    return bool(node.output) and len(node.input) in _INPUTS.get(node.op_type, (1,))


class Constants:
    """The constant tensors of a model's main graph, by name.

    Attributes:
        overridable: initializers that a caller may replace, being graph inputs too.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._initializers = {t.name: t for t in model.graph.initializer}
        self._nodes = {n.output[0]: n for n in model.graph.node if is_constant_op(n) and _is_whole(n)}
        # Before IR 4 every initializer is listed as an input, and none can be overridden.
        self.overridable = {i.name for i in model.graph.input} if model.ir_version >= 4 else set()

    def chain(self, tensor: str) -> list[str] | None:
        """Names from a tensor back to its data through `CONSTANT_OPS`; None when it is computed."""
        chain = [tensor]
        while chain[-1] not in self._initializers:
            node = self._nodes.get(chain[-1])
            if node is None or len(chain) > 16 or not all(map(self._is_given, node.input[1:])):
                return None
            if node.op_type == "Constant":
                return chain
            chain.append(node.input[0])
        return chain

    def _is_given(self, name: str) -> bool:
        """Whether a tensor is stored as it is, and no caller can change it: the shape or the axes of a node."""
        node = self._nodes.get(name)
        stored = name in self._initializers or (node is not None and node.op_type == "Constant")
        return stored and name not in self.overridable

    def overrides(self, tensor: str) -> bool:
        """Whether a caller can change a constant tensor, because it or what it comes from is also a graph input."""
        return bool(self.overridable.intersection(self.chain(tensor) or ()))

    def fixed(self, tensor: str) -> npt.NDArray[Any] | None:
        """The value of a constant tensor that no caller can change and whose entries are finite, else None."""
        value = None if self.overrides(tensor) else self.value(tensor)
        return value if value is not None and bool(np.isfinite(value.astype(np.float64)).all()) else None

    def is_sparse(self, tensor: str) -> bool:
        """Whether a tensor is a sparse initializer or the sparse value of a Constant node."""
        node = self._nodes.get(tensor)
        stored = any(t.values.name == tensor for t in self._model.graph.sparse_initializer)
        return stored or (node is not None and any(a.name == "sparse_value" for a in node.attribute))

    def value(self, tensor: str) -> npt.NDArray[Any] | None:
        """The value of a constant tensor, evaluated through `CONSTANT_OPS`; None when it is computed."""
        chain = self.chain(tensor)
        if chain is None:
            return None
        root = self._root_tensor(chain[-1])
        if root is None:
            return None
        value = read_tensor(root, self._folder)
        try:
            for name in reversed(chain[:-1]):
                node = self._nodes[name]
                value = evaluated(node, value, self._second(node))
        except (ValueError, KeyError, TypeError, IndexError):  # what does not fit: the runtime says so
            return None
        return value

    def _second(self, node: onnx.NodeProto) -> npt.NDArray[Any] | None:
        """The value of a node's second input; None where it has none."""
        if len(node.input) < 2:
            return None
        name = node.input[1]
        maker = self._nodes.get(name)
        if name not in self._initializers and maker is not None and (ints := attribute(maker, "value_ints", None)):
            return np.asarray(ints)
        root = self._root_tensor(name)
        if root is None:
            raise ValueError("a shape that is not stored as a tensor")
        return read_tensor(root, self._folder)

    def tensor(self, name: str, value: npt.NDArray[Any], read: Iterable[str]) -> onnx.TensorProto:
        """A new initializer; where one of the constants `read` lies in a data file with this value, the same bytes."""
        for chain in filter(None, map(self.chain, filter(None, read))):
            root = self._initializers.get(chain[-1])
            if root is not None and is_external(root) and tuple(root.dims) == value.shape:
                known = read_tensor(root, self._folder)
                if known.dtype == value.dtype and np.array_equal(known, value):
                    there = onnx.TensorProto()
                    there.CopyFrom(root)
                    there.name = name
                    return there
        return make_tensor(name, value)

    def _root_tensor(self, name: str) -> onnx.TensorProto | None:
        initializer: onnx.TensorProto | None = self._initializers.get(name)
        if initializer is not None:
            return initializer
        node = self._nodes[name]
        tensors: list[onnx.TensorProto] = [a.t for a in node.attribute if a.name == "value"]
        return tensors[0] if tensors else plain_constant(node)
