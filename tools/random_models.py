"""ResNet-50, ViT-B/16 and BERT-base as ONNX graphs with seeded random weights, written without torch.

The layers, shapes and parameter counts are those of the published models; the weights are not trained. Each matrix is
Gaussian with singular values that fall as i^-0.75 (a tail of about 1 % of the energy behind half of the rank), so that
low ranks lose little and plans differ from site to site. Such a model says how fast a shape runs at a rank; what a rank
loses on it says nothing about a trained one.

python tools/random_models.py NAME OUT.onnx
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import scipy.fft
from onnx import helper, numpy_helper

DECAY = 0.75
Fill = Callable[[np.random.Generator], np.ndarray]


def spectral(rng: np.random.Generator, outputs: int, inputs: int, gain: float) -> np.ndarray:
    """N×K with singular values that fall as i^-DECAY and outputs of variance `gain` on unit inputs."""
    falling = np.arange(1, inputs + 1, dtype=np.float32) ** -DECAY
    rows = rng.standard_normal((outputs, inputs), dtype=np.float32) * falling
    mixed = scipy.fft.dct(rows, axis=1, norm="ortho") * rng.choice(np.float32([-1, 1]), inputs)
    return (mixed * math.sqrt(gain * outputs) / np.linalg.norm(mixed)).astype(np.float32)


class Net:
    """A graph that grows node by node; weights are only shapes until `model` fills them."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.fills: dict[str, Fill] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.statistics: set[str] = set()

    @property
    def parameters(self) -> int:
        """Trainable numbers: all but the running statistics of BatchNormalization."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if name not in self.statistics)

    def weight(self, name: str, shape: Sequence[int], fill: Fill) -> str:
        """A float tensor."""
        self.shapes[name], self.fills[name] = tuple(shape), fill
        return name

    def full(self, name: str, size: int, value: float, *, statistic: bool = False) -> str:
        """A vector of one value."""
        if statistic:
            self.statistics.add(name)
        return self.weight(name, (size,), lambda _: np.full(size, value, np.float32))

    def constant(self, name: str, values: Any, dtype: Any = np.int64) -> str:
        """A small array that is no weight."""
        self.constants[name] = np.array(values, dtype)
        return name

    def add(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """A node whose one output has its name."""
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"/{name}/{op}", **attributes))
        return name

    def linear(self, x: str, name: str, inputs: int, outputs: int, gain: float = 1.0) -> str:
        """MatMul and bias Add, as exporters write a Linear."""
        w = self.weight(f"{name}.weight", (inputs, outputs), lambda r: spectral(r, outputs, inputs, gain).T)
        return self.add(
            "Add", [self.add("MatMul", [x, w], f"{name}.matmul"), self.full(f"{name}.bias", outputs, 0.0)], name
        )

    def conv(self, x: str, name: str, shape: Sequence[int], stride: int, *, bias: bool, gain: float = 2.0) -> str:
        """Conv with padding that keeps the size; shape is outputs, inputs, kernel, kernel."""
        n, rest, pad = shape[0], math.prod(shape[1:]), (shape[2] - 1) // 2 if stride < shape[2] else 0
        w = self.weight(f"{name}.weight", shape, lambda r: spectral(r, n, rest, gain).reshape(shape))
        given = [x, w, self.full(f"{name}.bias", n, 0.0)] if bias else [x, w]
        return self.add("Conv", given, name, kernel_shape=shape[2:], strides=[stride] * 2, pads=[pad] * 4)

    def norm(self, x: str, name: str, width: int) -> str:
        """LayerNormalization over the last axis."""
        scale, shift = self.full(f"{name}.weight", width, 1.0), self.full(f"{name}.bias", width, 0.0)
        return self.add("LayerNormalization", [x, scale, shift], name, axis=-1, epsilon=1e-5)

    def batch_norm(self, x: str, name: str, width: int, scale: float = 1.0) -> str:
        """BatchNormalization for inference."""
        given = [self.full(f"{name}.weight", width, scale), self.full(f"{name}.bias", width, 0.0)]
        given += [
            self.full(f"{name}.{what}", width, value, statistic=True) for what, value in (("mean", 0), ("var", 1))
        ]
        return self.add("BatchNormalization", [x, *given], name)

    def model(self, inputs: dict[str, tuple[int, list[Any]]], output: str, width: int, seed: int) -> onnx.ModelProto:
        """The model with weights of that seed; inputs by name are an ONNX type and dims."""
        rng = np.random.default_rng(seed)
        tensors = [numpy_helper.from_array(np.ascontiguousarray(fill(rng)), name) for name, fill in self.fills.items()]
        tensors += [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        entries = [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in inputs.items()]
        y = helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, ["n", width])
        graph = helper.make_graph(self.nodes, "random", entries, [y], tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@dataclasses.dataclass(frozen=True)
class Built:
    """A graph without values yet, its inputs, its output and how wide that is, and the shapes of one sample."""

    net: Net
    inputs: dict[str, tuple[int, list[Any]]]
    output: str
    width: int
    sample: dict[str, tuple[int, ...]]

    def save(self, path: Path, seed: int = 0) -> None:
        """Fill and write it."""
        onnx.save(self.net.model(self.inputs, self.output, self.width, seed), path)

    def batch(self, size: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs for a batch."""
        return {name: (size, *shape[1:]) for name, shape in self.sample.items()}


def resnet50(blocks: Iterable[int] = (3, 4, 6, 3), width: int = 64, image: int = 224, classes: int = 1000) -> Built:
    """He et al. 2015, as in torchvision: bottlenecks with the stride in the 3×3 convolution."""
    net = Net()
    x = net.add(
        "Relu", [net.batch_norm(net.conv("image", "conv1", (width, 3, 7, 7), 2, bias=False), "bn1", width)], "stem"
    )
    x = net.add("MaxPool", [x], "pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    inputs = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            inner, stride = width << stage, 2 if stage and not block else 1
            name, y = f"layer{stage + 1}.{block}", x
            for i, (size, kernel, step) in enumerate([(inner, 1, 1), (inner, 3, stride), (4 * inner, 1, 1)]):
                before = inputs if i == 0 else inner
                y = net.conv(y, f"{name}.conv{i + 1}", (size, before, kernel, kernel), step, bias=False)
                y = net.batch_norm(y, f"{name}.bn{i + 1}", size, 0.3 if i == 2 else 1.0)
                y = net.add("Relu", [y], f"{name}.relu{i + 1}") if i < 2 else y
            if not block:
                short = net.conv(x, f"{name}.short", (4 * inner, inputs, 1, 1), stride, bias=False, gain=1.0)
                x = net.batch_norm(short, f"{name}.short.bn", 4 * inner)
            x, inputs = net.add("Relu", [net.add("Add", [x, y], f"{name}.sum")], name), 4 * inner
    x = net.add("Flatten", [net.add("GlobalAveragePool", [x], "mean")], "features")
    w = net.weight("fc.weight", (classes, inputs), lambda r: spectral(r, classes, inputs, 1.0))
    y = net.add("Gemm", [x, w, net.full("fc.bias", classes, 0.0)], "logits", transB=1)
    return Built(
        net, {"image": (onnx.TensorProto.FLOAT, ["n", 3, image, image])}, y, classes, {"image": (1, 3, image, image)}
    )


def attention(net: Net, x: str, name: str, length: int, width: int, heads: int, mask: str | None) -> str:
    """Scaled dot products of heads, as exporters write them, with its output projection."""
    split = net.constant(f"{name}.split", [0, length, heads, width // heads])
    parts = {}
    for part in ("query", "key", "value"):
        y = net.add("Reshape", [net.linear(x, f"{name}.{part}", width, width), split], f"{name}.{part}.heads")
        order = [0, 2, 3, 1] if part == "key" else [0, 2, 1, 3]
        parts[part] = net.add("Transpose", [y], f"{name}.{part}.t", perm=order)
    scores = net.add("MatMul", [parts["query"], parts["key"]], f"{name}.scores")
    root = net.constant(f"{name}.root", math.sqrt(width // heads), np.float32)
    scores = net.add("Div", [scores, root], f"{name}.scaled")
    scores = net.add("Add", [scores, mask], f"{name}.masked") if mask else scores
    seen = net.add("MatMul", [net.add("Softmax", [scores], f"{name}.softmax", axis=-1), parts["value"]], f"{name}.seen")
    seen = net.add("Transpose", [seen], f"{name}.seen.t", perm=[0, 2, 1, 3])
    seen = net.add("Reshape", [seen, net.constant(f"{name}.join", [0, length, width])], f"{name}.joined")
    return net.linear(seen, f"{name}.out", width, width, gain=0.5)


def mlp(net: Net, x: str, name: str, width: int) -> str:
    """Linear, GELU by Erf, Linear."""
    h = net.linear(x, f"{name}.up", width, 4 * width)
    root, one, half = (
        net.constant(f"{name}.{k}", v, np.float32) for k, v in (("r", math.sqrt(2)), ("o", 1), ("h", 0.5))
    )
    erf = net.add("Erf", [net.add("Div", [h, root], f"{name}.div")], f"{name}.erf")
    gelu = net.add(
        "Mul", [net.add("Mul", [h, net.add("Add", [erf, one], f"{name}.one")], f"{name}.two"), half], f"{name}.gelu"
    )
    return net.linear(gelu, f"{name}.down", 4 * width, width, gain=0.5)


def vit_b(layers: int = 12, width: int = 768, heads: int = 12, image: int = 224, classes: int = 1000) -> Built:
    """Dosovitskiy et al. 2021, patches of 16, as in torchvision: normalisation before each part."""
    net, count = Net(), (image // 16) ** 2
    x = net.conv("image", "patches", (width, 3, 16, 16), 16, bias=True, gain=1.0)
    x = net.add("Reshape", [x, net.constant("flat", [0, width, count])], "flattened")
    x = net.add("Transpose", [x], "tokens", perm=[0, 2, 1])
    first = net.weight("class", (1, 1, width), lambda r: r.standard_normal((1, 1, width), dtype=np.float32))
    sizes = net.add("Shape", ["tokens"], "sizes", start=0, end=1)
    tail = net.constant("tail", [1, width])
    x = net.add(
        "Concat",
        [net.add("Expand", [first, net.add("Concat", [sizes, tail], "size", axis=0)], "classes"), x],
        "all",
        axis=1,
    )
    where = net.weight(
        "position", (1, count + 1, width), lambda r: r.standard_normal((1, count + 1, width), np.float32) * 0.1
    )
    x = net.add("Add", [x, where], "embedded")
    for i in range(layers):
        y = attention(net, net.norm(x, f"{i}.ln1", width), f"{i}.attention", count + 1, width, heads, None)
        x = net.add("Add", [x, y], f"{i}.middle")
        x = net.add("Add", [x, mlp(net, net.norm(x, f"{i}.ln2", width), f"{i}.mlp", width)], f"{i}.end")
    x = net.add("Gather", [net.norm(x, "ln", width), net.constant("zero", 0)], "token", axis=1)
    y = net.linear(x, "head", width, classes)
    return Built(
        net, {"image": (onnx.TensorProto.FLOAT, ["n", 3, image, image])}, y, classes, {"image": (1, 3, image, image)}
    )


def bert_base(layers: int = 12, width: int = 768, heads: int = 12, length: int = 128, words: int = 30522) -> Built:
    """Devlin et al. 2018, uncased, with the pooler: normalisation after each part."""
    net, ints = Net(), onnx.TensorProto.INT64

    def table(name: str, rows: int) -> str:
        return net.weight(name, (rows, width), lambda r: r.standard_normal((rows, width), np.float32) * 0.5)

    word = net.add("Gather", [table("word", words), "input_ids"], "word.rows")
    kind = net.add("Gather", [table("type", 2), "token_type_ids"], "type.rows")
    ends = [net.constant(name, [value]) for name, value in (("from", 0), ("to", length), ("axis", 0))]
    place = net.add("Slice", [table("position", 512), *ends], "position.rows")
    x = net.add("Add", [net.add("Add", [word, kind], "word.type"), place], "summed")
    x = net.norm(x, "embedded", width)
    seen = net.add(
        "Unsqueeze", [net.add("Cast", ["attention_mask"], "m", to=1), net.constant("m.axes", [1, 2])], "m.wide"
    )
    hidden = net.add("Sub", [net.constant("m.one", 1, np.float32), seen], "m.hidden")
    mask = net.add("Mul", [hidden, net.constant("m.low", -1e4, np.float32)], "mask")
    for i in range(layers):
        y = attention(net, x, f"{i}.attention", length, width, heads, mask)
        x = net.norm(net.add("Add", [x, y], f"{i}.middle"), f"{i}.ln1", width)
        x = net.norm(net.add("Add", [x, mlp(net, x, f"{i}.mlp", width)], f"{i}.sum"), f"{i}.ln2", width)
    first = net.add("Gather", [x, net.constant("zero", 0)], "token", axis=1)
    y = net.add("Tanh", [net.linear(first, "pooler", width, width)], "pooled")
    names = ("input_ids", "attention_mask", "token_type_ids")
    return Built(net, {n: (ints, ["n", length]) for n in names}, y, width, dict.fromkeys(names, (1, length)))


MODELS: dict[str, Callable[..., Built]] = {"resnet50": resnet50, "vit-b": vit_b, "bert-base": bert_base}
TINY: dict[str, dict[str, Any]] = {
    "resnet50": {"blocks": (1, 1), "width": 16, "image": 32, "classes": 10},
    "vit-b": {"layers": 1, "width": 64, "heads": 4, "image": 48, "classes": 10},
    "bert-base": {"layers": 1, "width": 64, "heads": 4, "length": 16, "words": 1000},
}
"""Arguments of models that build and run in a second: for dry runs."""


if __name__ == "__main__":
    MODELS[sys.argv[1]]().save(Path(sys.argv[2]))
