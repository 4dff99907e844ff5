"""The graph: GraphSurgeon for matching and rewiring, the original ModelProto as the source of truth.

GraphSurgeon imports a *skeleton*: nodes without attributes, initializers without data, subgraphs as the outer
tensors that they read. So nothing that it cannot import can break, and nothing that it drops can be lost:
`commit` puts the untouched NodeProtos back as they were. Never compare GraphSurgeon objects with `==`, `in`,
`index` or `remove` (equality is by value); nodes are known by their position here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from onnx_lowrank.constants import Constants, is_constant_op
from onnx_lowrank.errors import PassError
from onnx_lowrank.fragment import Fragment, Op, X
from onnx_lowrank.protos import all_names, opset_of, reads, skeleton, unique_names


@dataclass(frozen=True)
class Place:
    """Nodes of a site, by position, that lead from tensor `x` to tensor `y`."""

    site: str
    nodes: tuple[int, ...]
    x: str
    y: str

    @property
    def outputs(self) -> tuple[str, ...]:
        """The tensors that a fragment makes there, in the order of its outputs."""
        return (self.y,)

    @property
    def position(self) -> int:
        """Where new nodes go."""
        return max(self.nodes)


@dataclass(frozen=True)
class Patch(Place):
    """One rewrite as a value: the nodes of a place become a fragment from its `x` to its `y`.

    Attributes:
        also: the other sites that it rewrites.
        others: tensors of the fragment's outputs after the first; such a patch has no twins.
        twins: other places where the same fragment goes, all reading the same constants.
    """

    fragment: Fragment
    made_by: str
    also: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    twins: tuple[Place, ...] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        """All places where the fragment goes."""
        return (self, *self.twins)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The first one and the others."""
        return (self.y, *self.others)

    @property
    def position(self) -> int:
        """What reads one output may stand before the node that made another one."""
        return min(self.nodes) if self.others else max(self.nodes)


class Graph:
    """A model's main graph, ready to be read and patched. The ModelProto given is never changed.

    Args:
        model: external data not loaded.
        folder: where external data lies.
        provenance: whether new nodes say in their metadata which pass made them, and of which site.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path, *, provenance: bool = True) -> None:
        self.model, self.folder, self._provenance = model, folder, provenance
        self.protos: list[onnx.NodeProto] = list(model.graph.node)
        self.constants = Constants(model, folder)
        self._surgeon = gs.import_onnx(skeleton(model))
        self._originals: list[Any] = list(self._surgeon.nodes)
        self._position = {id(node): position for position, node in enumerate(self._originals)}
        self._new: dict[int, list[onnx.NodeProto]] = {}
        self._new_tensors: list[onnx.TensorProto] = []
        self._removed: set[int] = set()
        self._tensors: dict[str, Any] = dict(self._surgeon.tensors())
        self._names = all_names(model)
        self.outputs = {o.name for o in model.graph.output}
        self.quantized = {a.tensor_name for a in model.graph.quantization_annotation}
        self.opset = opset_of(model)
        self.names = unique_names(self.protos)

    def readers(self, tensor: str) -> list[int]:
        """Positions of the nodes that read a tensor; a node that reads it twice, or in a subgraph too, counts again."""
        found = self._tensors.get(tensor)
        return [] if found is None else [self._position[id(node)] for node in found.outputs]

    def weight_readers(self, root: str) -> list[int]:
        """Positions of the nodes that read a constant, itself or through `CONSTANT_OPS`.

        A node that reads it twice counts twice. Whatever would keep the constant alive besides is there as -1: a graph
        output, or a chain that nothing reads.
        """
        found, waiting = [], [root]
        while waiting:
            name = waiting.pop()
            readers = self.readers(name)
            if name in self.outputs or not readers:
                found.append(-1)
            for position in readers:
                made = self.protos[position].output
                constant = is_constant_op(self.protos[position]) and self.constants.chain(made[0]) is not None
                if constant:
                    waiting.append(made[0])
                else:
                    found.append(position)
        return sorted(found)

    def producer(self, tensor: str) -> int | None:
        """Position of the node that makes a tensor."""
        found = self._tensors.get(tensor)
        return self._position[id(found.inputs[0])] if found is not None and found.inputs else None

    def smooth_outputs(self) -> list[str]:
        """The graph's outputs, and in place of a Softmax or Sigmoid what enters it: it saturates, and hides errors."""
        found = []
        for output in self.model.graph.output:
            position = self.producer(output.name)
            node = None if position is None else self.protos[position]
            squashed = node is not None and node.op_type in ("Softmax", "LogSoftmax", "Sigmoid")
            found.append(node.input[0] if node is not None and squashed else output.name)
        return list(dict.fromkeys(found))

    def fresh(self, base: str) -> str:
        """A name that nothing in the model has; the one hand that gives out names."""
        name = next(
            n for n in itertools.chain([base], (f"{base}_{i}" for i in itertools.count(1))) if n not in self._names
        )
        self._names.add(name)
        return name

    def apply(self, patch: Patch) -> dict[str, str]:
        """Check a patch and put its nodes in the place of the old ones.

        Returns:
            The tensor name that each local name of the fragment got, at the first place.

        Raises:
            PassError: nodes already replaced, a tensor between them read elsewhere, or a fragment that does not
                lead from `x` to `y`.
        """
        self._check(patch)
        read = [name for place in patch.places for p in place.nodes for name in self.protos[p].input]
        names, tensors = {}, {}
        for local, array in patch.fragment.constants.items():
            names[local] = self.fresh(f"{patch.site}/{local}")
            self._new_tensors.append(self.constants.tensor(names[local], array, read))
            tensors[local] = gs.Constant(names[local], np.zeros(0, np.float32))
        found = [self._put(patch, place, dict(names), dict(tensors)) for place in patch.places]
        self._drop_unread(read)
        return found[0]

    def _put(self, patch: Patch, place: Place, names: dict[str, str], tensors: dict[str, Any]) -> dict[str, str]:
        """Put the fragment's nodes in one place; adds to the names and tensors of its constants."""
        ends = {X: place.x, **dict(zip(patch.fragment.outputs, place.outputs, strict=True))}
        names |= ends
        tensors |= {local: self._tensors[name] for local, name in ends.items()}
        for position in place.nodes:
            self._detach(position)
        made = []
        for op in patch.fragment.ops:
            if op.output not in patch.fragment.outputs:
                names[op.output] = self.fresh(f"{op.owner or place.site}/{op.output}")
                tensors[op.output] = gs.Variable(names[op.output])
            made.append(self._make(op, patch, place, names, tensors))
        self._new[place.position] = made
        return names

    def _make(
        self, op: Op, patch: Patch, place: Place, names: dict[str, str], tensors: dict[str, Any]
    ) -> onnx.NodeProto:
        owner = op.owner or place.site
        name = self.fresh(f"{owner}/{op.name}") if op.name else owner
        node = gs.Node(op.op, name, inputs=[tensors[i] for i in op.inputs], outputs=[tensors[op.output]])
        self._surgeon.nodes.append(node)
        self._position[id(node)] = place.position
        proto = helper.make_node(op.op, [names[i] for i in op.inputs], [names[op.output]], name=name, **op.attributes)
        if hasattr(proto, "metadata_props"):
            for old in self.protos[place.nodes[0]].metadata_props:
                if not old.key.startswith("onnx_lowrank."):
                    proto.metadata_props.add(key=old.key, value=old.value)
            if self._provenance:
                proto.metadata_props.add(key="onnx_lowrank.pass", value=patch.made_by)
                proto.metadata_props.add(key="onnx_lowrank.site", value=owner if owner in patch.also else place.site)
        return proto

    def _check(self, patch: Patch) -> None:
        where, taken = f"{patch.made_by} at {patch.site}", set(self._removed)
        for place in patch.places:
            if not taken.isdisjoint(place.nodes):
                raise PassError(f"{where}: its node was already replaced")
            taken.update(place.nodes)
            for name in (place.x, *place.outputs):
                if name not in self._tensors:
                    raise PassError(f"{where}: tensor '{name}' does not exist")
            inner = {name for p in place.nodes for name in self.protos[p].output if name} - set(place.outputs)
            for name in inner:
                if name in self.outputs or any(reader not in place.nodes for reader in self.readers(name)):
                    raise PassError(f"{where}: tensor '{name}' between its nodes is read elsewhere")
        known = {X, *patch.fragment.constants}
        for op in patch.fragment.ops:
            if not known.issuperset(op.inputs) or op.output in known:
                raise PassError(f"{where}: node '{op.name}' of the fragment is not sorted or not single-assigned")
            known.add(op.output)
        outputs = patch.fragment.outputs
        if not known.issuperset(outputs) or any(len(outputs) != len(place.outputs) for place in patch.places):
            raise PassError(f"{where}: the fragment does not produce its output")

    def _detach(self, position: int) -> None:
        node = self._originals[position]
        self._removed.add(position)
        for tensor in node.inputs:
            _remove_by_identity(tensor.outputs, node)
        for tensor in node.outputs:
            _remove_by_identity(tensor.inputs, node)

    def _drop_unread(self, tensors: list[str]) -> None:
        """Remove constant nodes that only the replaced nodes read, back to their initializers."""
        while tensors:
            name = tensors.pop()
            producer = self.producer(name) if name else None
            if producer is None or producer in self._removed or not is_constant_op(self.protos[producer]):
                continue
            if not self.readers(name) and name not in self.outputs and self.constants.chain(name) is not None:
                tensors.extend(self.protos[producer].input)
                self._detach(producer)

    def commit(self) -> onnx.ModelProto:
        """The patched model: untouched nodes as they were, new nodes where the old ones stood.

        Initializers go only when they *became* unread; value infos only when their tensor is gone.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        if not self._removed:
            return model
        nodes = list(self._committed_nodes())
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        before, after = reads(self.model.graph, self.protos), reads(self.model.graph, nodes)
        kept = self.outputs | self.constants.overridable
        unread = {
            t.name for t in self.model.graph.initializer if before[t.name] and not after[t.name] and t.name not in kept
        }
        _keep_only(model.graph.initializer, lambda t: t.name not in unread)
        model.graph.initializer.extend(self._new_tensors)
        if self.model.ir_version < 4:
            _keep_only(model.graph.input, lambda i: i.name not in unread)
            model.graph.input.extend(
                helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in self._new_tensors
            )
        gone = {o for p in self._removed for o in self.protos[p].output} - {o for n in nodes for o in n.output}
        gone |= unread
        _keep_only(model.graph.value_info, lambda v: v.name not in gone)
        _keep_only(model.graph.quantization_annotation, lambda a: a.tensor_name not in gone)
        return model

    def _committed_nodes(self) -> Iterator[onnx.NodeProto]:
        for position, proto in enumerate(self.protos):
            if position not in self._removed:
                yield proto
            yield from self._new.get(position, ())


def _remove_by_identity(nodes: Any, node: Any) -> None:
    for index in reversed(range(len(nodes))):
        if nodes[index] is node:
            list.pop(nodes, index)  # the list of GraphSurgeon itself would search by value


def _keep_only(field: Any, wanted: Any) -> None:
    for index in reversed(range(len(field))):
        if not wanted(field[index]):
            del field[index]
