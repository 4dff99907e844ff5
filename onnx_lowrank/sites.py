"""Sites: the linear maps of a model, as values that need neither the graph nor the runtime."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.linalg import Array

Tap = tuple[str, int | tuple[int, ...]]
"""A tensor and the axis of its channels."""


class Why(enum.Enum):
    """Why a node keeps its weight: a closed list, counted in the report, each proven reachable by a test."""

    NOT_LINEAR = "not a linear map"
    UNSUPPORTED_OP = "a linear operator that is not factored yet"
    WEIGHT_NOT_CONSTANT = "its weight is computed at run time"
    BATCHED = "its weight is a batch of matrices"
    VECTOR = "its weight is a vector"
    GROUPED = "a depthwise convolution, or one whose groups have one channel"
    SHARED = "its weight is also read in another way: by another kind of node, turned, with other sizes, as an output"
    IN_BODY = "its weight also enters an If, Loop or Scan and stays dense there, so that factors would only add to it"
    OVERRIDABLE = "its weight is also a graph input, so that a caller may override it"
    IS_OUTPUT = "its weight is a graph output"
    QUANTIZED = "its weight carries quantization annotations"
    DEQUANTIZED = "its weight is stored as integers (DequantizeLinear): smaller factors need a very low rank, not tried"
    SPARSE = "its weight is sparse"
    DTYPE = "its weight is not float16, bfloat16, float32 or float64"
    NOT_FINITE = "its weight has NaN or infinite entries"
    EMPTY = "its weight has a dimension of zero"
    BIAS = "its bias is not a constant vector over the output channels"
    OPSET = "its operator set is older than 7"
    MALFORMED = "its inputs or attributes are not those of its operator"
    SUBGRAPH = "inside the body of an If, Loop or Scan that is not opened"
    FUNCTION = "inside a model-local function (--inline-functions opens it)"
    EXCLUDED = "left out by --include or --exclude"
    NOT_EXECUTED = "never executed by the calibration data"
    TOO_SMALL = "two thin factors would cost no less than the dense weight"
    NOT_TIMED = "the given table does not know its shapes"
    NOT_FASTER = "no rank was measured faster than the dense weight"
    LOSS = "no faster rank stays within the loss"
    IN_FLOAT = "left in float: in the precision asked for it costs too much loss"
    GIVEN_BACK = "given back, so that the saved model holds its loss and its speed"


@dataclasses.dataclass(frozen=True)
class Keep:
    """A node that stays as it is, and the reason."""

    node: str
    op: str
    why: Why


@dataclasses.dataclass(frozen=True)
class Geometry:
    """All that decides how fast a site runs. Hashable: equal geometries share one latency table.

    `outputs` is N and `inputs` is K of the weight matrix `W (N×K)`; for a convolution `K = C·kh·kw`, where C are the
    `channels` that one group reads: with g `groups`, N/g rows of W belong to each. A ConvTranspose whose taps do not
    overlap writes N·kh·kw numbers out of C at every position (its W is that map, `pointwise`); another one is `W` with
    `K = C·kh·kw`. A constant that is a `batch` of matrices is as many groups as it has entries.
    `side` tells where a MatMul has its constant, `then` which activation follows a convolution (it may be fused
    into it, so it is timed along). `x_shape` is empty until a run has shown it.
    """

    op: str
    outputs: int
    inputs: int
    dtype: str
    bias: bool
    opset: int
    side: str = "right"
    trans_a: bool = False
    channels: int = 0
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    then: str = ""
    groups: int = 1
    batch: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    x_shape: tuple[int, ...] = ()

    @property
    def pointwise(self) -> bool:
        """A linear map of single positions: MatMul, Gemm, Conv with a kernel of ones, ConvTranspose without overlap."""
        return self.inputs == self.channels if self.op == "ConvTranspose" else math.prod(self.kernel) == 1

    @property
    def scatters(self) -> bool:
        """Whether the rows of W are output channels at each tap of a ConvTranspose, so that taps share a bias."""
        return self.op == "ConvTranspose" and self.pointwise

    @property
    def conv_attributes(self) -> dict[str, Any]:
        """Attributes of the Conv that owns the spatial axes."""
        found: dict[str, Any] = {
            "kernel_shape": list(self.kernel),
            "strides": list(self.strides),
            "dilations": list(self.dilations),
        }
        if self.groups > 1:
            found["group"] = self.groups
        if any(self.output_padding):
            found["output_padding"] = list(self.output_padding)
        if self.auto_pad == "NOTSET":
            found["pads"] = list(self.pads)
        else:
            found["auto_pad"] = self.auto_pad
        return found

    def key(self) -> str:
        """One readable line that names the geometry; key of the latency cache."""
        x = "x".join(map(str, self.x_shape))
        text = f"{self.op} {self.outputs}x{self.inputs} {self.dtype} x={x} bias={int(self.bias)}"
        if self.kernel:
            parts = zip("ksdp", (self.kernel, self.strides, self.dilations, self.pads), strict=True)
            spatial = " ".join(f"{name}={','.join(map(str, values))}" for name, values in parts)
            groups = f" g={self.groups}" if self.groups > 1 else ""
            more = f" o={','.join(map(str, self.output_padding))}" if any(self.output_padding) else ""
            return f"{text} {spatial} {self.auto_pad}{groups}{more}{' then ' + self.then if self.then else ''}"
        batch = f" batch={','.join(map(str, self.batch))}" if self.batch else ""
        return f"{text} {self.side}{' transA' if self.trans_a else ''}{batch}"


@dataclasses.dataclass(frozen=True)
class Site:
    """One node with a constant weight that is a linear map `y = W x + b`.

    Attributes:
        name: unique readable name of the node.
        geometry: sizes and attributes.
        weight: `W`, N×K, in the model's dtype.
        bias: `b`, N, float64, or None where a bias would need an added node.
        x, y: names of the tensors that enter and leave.
        nodes: positions in the graph of the nodes that the site stands for (itself, an absorbed bias or norm).
        x_shapes: shapes of x, one for every set of input shapes that is timed.
        joins: where an Add of another computed tensor alone reads y, a residual sum: its output and that tensor.
        branch: the If, Loop or Scan, by its first output, in whose opened body the site stands; else empty.
        twins: the other nodes that read the same weight in the same way, each as a site without twins. There is one
            decision for all, and one set of factors that all of them read.
    """

    name: str
    geometry: Geometry
    weight: npt.NDArray[Any] = dataclasses.field(repr=False, compare=False)
    bias: Array | None = dataclasses.field(repr=False, compare=False)
    x: str
    y: str
    nodes: tuple[int, ...]
    x_shapes: tuple[tuple[int, ...], ...] = ()
    joins: tuple[str, str] | None = None
    branch: str = ""
    twins: tuple[Site, ...] = ()

    @property
    def places(self) -> tuple[Site, ...]:
        """The site and its twins: every node that reads the weight."""
        return (self, *self.twins)

    @property
    def geometries(self) -> tuple[Geometry, ...]:
        """The geometry at every timed shape, of every place."""
        shapes = [shape for place in self.places for shape in place.x_shapes]
        return tuple(dataclasses.replace(self.geometry, x_shape=shape) for shape in shapes)

    @property
    def centred(self) -> bool:
        """Whether the mean can be corrected for free, so that the covariance replaces the second moment."""
        return self.bias is not None and not self.geometry.scatters

    @property
    def tap(self) -> str:
        """`input`: moments are K×K at x; `output`: N×N at y. The smaller one, where both are possible."""
        g = self.geometry
        if g.scatters:  # its output has taps side by side
            return "input"
        strided = any(s != 1 for s in g.strides) or any(p != 0 for p in g.pads) or g.auto_pad != "NOTSET"
        smaller = g.groups == 1 and g.inputs < g.outputs
        return "input" if g.pointwise and not strided and smaller else "output"

    @property
    def tensor(self) -> str:
        """Name of the tensor whose moments are taken."""
        return self.x if self.tap == "input" else self.y

    @property
    def channel_axis(self) -> int | tuple[int, ...]:
        """Axis that holds K (input) or N (output) of the tapped tensor; for a batch, axes of its groups too."""
        g = self.geometry
        if g.kernel:
            return 1
        if g.groups > 1:
            return (*(i - 2 - len(g.batch) for i, size in enumerate(g.batch) if size > 1), -1)
        if g.side == "left":
            return -1 if len(g.x_shape) == 1 else -2
        return 0 if g.trans_a and self.tap == "input" else -1

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What moments are taken of: the tensor of every place, and the axis of its channels."""
        return tuple((place.tensor, self.channel_axis) for place in self.places)

    @property
    def bias_vector(self) -> Array:
        """`b`, N, float64: zeros where there is none."""
        return np.zeros(self.geometry.outputs) if self.bias is None else self.bias

    def seen(self, x_shapes: tuple[tuple[int, ...], ...]) -> Site:
        """The same site with the input shapes that runs have shown; the first one is the geometry's."""
        geometry = dataclasses.replace(self.geometry, x_shape=x_shapes[0])
        return dataclasses.replace(self, geometry=geometry, x_shapes=x_shapes)
