"""Make a hidden layer narrower: fewer channels between two sites, and no node more.

    before   x -[ W₁  C×K, b₁ ]-[ channelwise … ]-[ W₂  N×C, b₂ ]-> y
    after    x -[ W₁[S]  r×K, b₁[S] ]-[ channelwise …, constants [S] ]-[ W₂'  N×r, b₂' ]-> y

`W₂' = W₂ C[:,S] C[S,S]⁻¹` takes over what the channels that go have in common with those that stay; exact where they
are dead or linear in them. Channelwise are activations, Add and Mul with a scalar or a vector over the channels, and
for convolutions also pooling, BatchNormalization and depthwise convolution. Cost r(K + N) multiply-adds in place of
C(K + N).
Left alone: channels that anything else reads, that leave the graph, or that an operator mixes (`chains.Broken`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.chains import Chain
from onnx_lowrank.fragment import Fragment, Op, X, Y
from onnx_lowrank.linalg import Array, Index
from onnx_lowrank.passes.linear import affine
from onnx_lowrank.sites import Geometry

NYSTROM = "nystrom"


def narrow_layer(chain: Chain, kept: Index, first: Array, first_bias: Array, second: Array, bias: Array) -> Fragment:
    """Both sites and what lies between them, over the kept channels only.

    Args:
        kept: r channels, ascending.
        first, first_bias: weight C×K and bias C of the producer.
        second, bias: weight N×(r·taps) and bias N of the consumer.
    """
    mine, theirs = chain.producer.geometry, narrower(chain.consumer.geometry, len(kept))
    tensors = {chain.start: "hidden"} | {op.output: f"hidden{i}" for i, op in enumerate(chain.ops)}
    locals_ = tensors | {name: f"constant{i}" for i, name in enumerate(chain.constants)}
    down, constants = affine(mine, "producer", X, "hidden", first[kept], first_bias[kept], first=True)
    up, up_constants = affine(theirs, "consumer", locals_[chain.end], Y, second, bias, first=True)
    between = {locals_[name]: constant.of(kept) for name, constant in chain.constants.items()}
    everything: dict[str, npt.NDArray[Any]] = {**constants, **between, **up_constants}
    ops = (
        *(dataclasses.replace(op, owner=chain.producer.name) for op in down),
        *(_renamed(op, locals_, len(kept)) for op in chain.ops),
        *(dataclasses.replace(op, owner=chain.consumer.name) for op in up),
    )
    return Fragment(ops, everything)


def narrower(geometry: Geometry, width: int) -> Geometry:
    """The geometry of a site that reads `width` channels."""
    if geometry.op == "Conv":
        taps = geometry.inputs // geometry.channels
        return dataclasses.replace(geometry, channels=width, inputs=width * taps)
    return dataclasses.replace(geometry, inputs=width)


def narrow_positions(chain: Chain) -> tuple[int, ...]:
    """Positions of all nodes that the fragment stands for."""
    return (*chain.producer.nodes, *chain.nodes, *chain.consumer.nodes)


def whole_layer(chain: Chain, rng: np.random.Generator, width: int) -> Fragment:
    """A fragment of that width with random weights, to be timed."""
    mine, theirs = chain.producer.geometry, narrower(chain.consumer.geometry, width)
    first, second = (rng.standard_normal((g.outputs, g.inputs)) / g.inputs**0.5 for g in (mine, theirs))
    biases = (np.zeros(g.outputs) for g in (mine, theirs))
    return narrow_layer(chain, np.arange(width), first, next(biases), second, next(biases))


def _renamed(op: Op, names: dict[str, str], width: int) -> Op:
    attributes = {**op.attributes, **({"group": width} if op.op == "Conv" else {})}
    inputs = tuple(names[name] for name in op.inputs)
    return dataclasses.replace(op, inputs=inputs, output=names[op.output], attributes=attributes)
