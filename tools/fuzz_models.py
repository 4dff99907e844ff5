"""Random valid models: sites of every operator and type, and around them all that exporters put there.

Weights are initializers, Constant nodes, behind Identity, Transpose, Cast, Reshape, Squeeze or DequantizeLinear, listed
as inputs, shared, sparse; bodies of If, Loop and Scan read them from outside or hold their own; functions, strings and
tied tables occur.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "float64": TensorProto.DOUBLE,
    "bfloat16": TensorProto.BFLOAT16,
}
FLAT = (
    "MatMul",
    "MatMul",
    "Gemm",
    "Gemm",
    "Left",
    "Bias",
    "Batched",
    "Function",
    "If",
    "Loop",
    "Scan",
    "Tied",
    "Fused",
)
IMAGES = ("Conv", "Conv", "ConvNorm", "Grouped", "Transposed", "Pool", "If")
ANY = ("Add", "Relu", "Tanh", "Identity", "Computed", "Twice", "Shape")


@dataclasses.dataclass
class Maker:
    """A model under construction; `shapes` has every activation's true shape, the newest last."""

    rng: random.Random
    dtype: str
    opset: int
    ir_version: int
    wide: tuple[int, ...] = ()
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    weights: dict[str, Array] = dataclasses.field(default_factory=dict)
    stored: list[TensorProto] = dataclasses.field(default_factory=list)
    sparse: list[onnx.SparseTensorProto] = dataclasses.field(default_factory=list)
    functions: list[onnx.FunctionProto] = dataclasses.field(default_factory=list)
    inputs: dict[str, Array] = dataclasses.field(default_factory=dict)

    def array(self, *shape: int) -> Array:
        rng = np.random.default_rng(self.rng.getrandbits(32))
        return (rng.standard_normal(shape) / math.sqrt(max(math.prod(shape[1:]), 1))).astype(self.dtype)

    def name(self) -> str:
        return self.rng.choice(["", f"n{len(self.nodes)}", f"/block.{len(self.nodes)}/op", f"größe {len(self.nodes)}"])

    def node(self, op: str, inputs: list[str], output: str = "", domain: str = "", **attributes: Any) -> str:
        output = output or f"t{len(self.nodes)}"
        made = helper.make_node(op, inputs, [output], name=self.name(), domain=domain, **attributes)
        if self.rng.random() < 0.2:
            made.metadata_props.add(key="from", value=f"line {len(self.nodes)}")
            made.doc_string = "where it came from"
        self.nodes.append(made)
        return output

    def weight(self, *shape: int) -> str:
        """A constant of that shape: an old one, or a new one in one of the many forms."""
        same = [name for name, value in self.weights.items() if value.shape == shape]
        if same and self.rng.random() < 0.15:
            return self.rng.choice(same)
        value, name = self.array(*shape), f"w{len(self.weights)}"
        forms = ["plain"] * 6 + [
            "Constant",
            "Constant",
            "Identity",
            "Transpose",
            "Cast",
            "listed",
            "typed",
            "Reshape",
            "Squeeze",
        ]
        forms += ["DequantizeLinear"] if self.dtype == "float32" and self.opset >= 13 else []
        forms += ["value_floats"] if self.dtype == "float32" and len(shape) == 1 and self.opset >= 12 else []
        forms += ["sparse"] if self.dtype == "float32" and self.ir_version >= 5 and self.opset >= 11 else []
        result = self._form(self.rng.choice(forms), name, value)
        self.weights[result] = value
        return result

    def _form(self, form: str, name: str, value: Array) -> str:
        if form == "Constant":
            return self.node("Constant", [], name, value=numpy_helper.from_array(value, name))
        if form == "value_floats":
            return self.node("Constant", [], name, value_floats=[float(v) for v in value])
        if form == "sparse":
            flat = numpy_helper.from_array(value.reshape(-1), name)
            index = numpy_helper.from_array(np.arange(value.size, dtype=np.int64), f"{name}_index")
            self.sparse.append(onnx.SparseTensorProto(values=flat, indices=index, dims=value.shape))
            return name
        if form == "DequantizeLinear":
            self.stored.append(numpy_helper.from_array(np.int8(np.clip(value * 50, -127, 127)), f"{name}_q"))
            self.stored.append(numpy_helper.from_array(np.float32(0.02), f"{name}_s"))
            return self.node("DequantizeLinear", [f"{name}_q", f"{name}_s"], name)
        if form in ("Reshape", "Squeeze"):
            return self._reshaped(form, name, value)
        raw = f"{name}_raw" if form in ("Identity", "Transpose", "Cast") else name
        held = value.T if form == "Transpose" else value
        if form == "Cast":
            others = [np.float16, np.float64, np.float32, *([ml_dtypes.bfloat16] if self.opset >= 13 else [])]
            held = held.astype(self.rng.choice(others))
        tensor = helper.make_tensor(raw, TYPES[self.dtype], value.shape, value.reshape(-1)) if form == "typed" else None
        self.stored.append(tensor or numpy_helper.from_array(np.ascontiguousarray(held), raw))
        if form == "listed" and self.ir_version >= 4:
            self.inputs[name] = value
        if form == "Cast":
            return self.node("Cast", [raw], name, to=TYPES[self.dtype])
        return self.node(form, [raw], name) if raw != name else name

    def _reshaped(self, form: str, name: str, value: Array) -> str:
        """A weight that is stored in another shape; axes are an attribute before operator set 13."""
        held = value.reshape(-1) if form == "Reshape" else value[None]
        self.stored.append(numpy_helper.from_array(held, f"{name}_held"))
        if form == "Squeeze" and self.opset < 13:
            return self.node(form, [f"{name}_held"], name, axes=[0])
        told = numpy_helper.from_array(np.array(value.shape if form == "Reshape" else [0], np.int64), f"{name}_told")
        if self.rng.random() < 0.5:
            self.stored.append(told)
            return self.node(form, [f"{name}_held", told.name], name)
        return self.node(form, [f"{name}_held", self.node("Constant", [], value=told)], name)

    def add(self, name: str, *shape: int) -> None:
        self.shapes[name] = tuple(shape)

    def step(self, op: str, x: str) -> None:
        """One operator, or a few, that read x."""
        getattr(self, f"_{op.lower()}")(x, self.shapes[x])

    def _matmul(self, x: str, shape: tuple[int, ...]) -> None:
        n = self.rng.choice([1, 2, 3, 5, 8, 16, *self.wide])
        self.add(self.node("MatMul", [x, self.weight(shape[-1], n)]), *shape[:-1], n)

    def _bias(self, x: str, shape: tuple[int, ...]) -> None:
        self._matmul(x, shape)
        y = list(self.shapes)[-1]
        read = self.rng.random() < 0.3
        shape = self.shapes[y] if read else self.shapes.pop(y)
        self.add(self.node("Add", self.rng.sample([y, self.weight(shape[-1])], 2)), *shape)

    def _batched(self, x: str, shape: tuple[int, ...]) -> None:
        if len(shape) == 1:
            return
        weight = self.weight(*shape[:-2], shape[-1], 3) if len(shape) == 3 else self.weight(shape[-1])
        self.add(self.node("MatMul", [x, weight]), *(shape[:-1] + ((3,) if len(shape) == 3 else ())))

    def _left(self, x: str, shape: tuple[int, ...]) -> None:
        rows = self.rng.choice([2, 4, 7])
        if len(shape) > 1:
            self.add(self.node("MatMul", [self.weight(rows, shape[-2]), x]), *shape[:-2], rows, shape[-1])

    def _gemm(self, x: str, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            return
        across, trans_a = self.rng.getrandbits(1), int(self.rng.random() < 0.2)
        rows, width = shape[::-1] if trans_a else shape
        n = self.rng.choice([1, 3, 8, 12])
        bias = self.rng.choice([(n,), (1, n), (1,), (n,), *([()] if self.opset >= 11 else [])])
        inputs = [x, self.weight(*((n, width) if across else (width, n)))] + ([self.weight(*bias)] if bias else [])
        scale = self.rng.choice([1.0, 1.0, 0.5])
        self.add(self.node("Gemm", inputs, transA=trans_a, transB=across, alpha=scale, beta=scale), rows, n)

    def _fused(self, x: str, shape: tuple[int, ...]) -> None:
        if self.dtype == "float32":
            self.add(self.node("FusedMatMul", [x, self.weight(shape[-1], 4)], domain="com.microsoft"), *shape[:-1], 4)

    def _function(self, x: str, shape: tuple[int, ...]) -> None:
        if self.ir_version < 8 or self.opset < 13:
            return
        name, value = f"Linear{len(self.functions)}", numpy_helper.from_array(self.array(shape[-1], 3), "w")
        body = [helper.make_node("Constant", [], ["w"], value=value), helper.make_node("MatMul", ["a", "w"], ["b"])]
        made = helper.make_function("local", name, ["a"], ["b"], body, [helper.make_opsetid("", self.opset)])
        made.doc_string = "a function"
        self.functions.append(made)
        self.add(self.node(name, [x], domain="local"), *shape[:-1], 3)

    def _tied(self, x: str, shape: tuple[int, ...]) -> None:
        """An embedding table that a head reads too."""
        if "ids" not in self.inputs:
            self.inputs["ids"] = np.array([0, 1, 1], np.int64)
        table = self.weight(6, shape[-1])
        self.add(self.node("Gather", [table, "ids"], axis=0), 3, shape[-1])
        self.add(self.node("MatMul", [x, self.node("Transpose", [table], perm=[1, 0])]), *shape[:-1], 6)

    def _if(self, x: str, shape: tuple[int, ...]) -> None:
        self.inputs.setdefault("choice", np.array(self.rng.random() < 0.5))
        both = self.rng.random() < 0.4  # one weight for both branches
        conv, n = len(shape) == 4, self.rng.choice([2, 4])
        sizes = (n, shape[1], 1, 1) if conv else (shape[-1], n)
        shared = self.weight(*sizes) if both else ""
        made = (shape[0], n, *shape[2:]) if conv else (*shape[:-1], n)
        branches = {k: self.body(k, x, shared, sizes, made) for k in ("then_branch", "else_branch")}
        self.add(self.node("If", ["choice"], **branches), *made)

    def body(self, label: str, x: str, weight: str, sizes: tuple[int, ...], made: tuple[int, ...]) -> onnx.GraphProto:
        out, op = f"{label}{len(self.nodes)}", "Conv" if len(sizes) == 4 else "MatMul"
        inner: list[onnx.NodeProto] = []
        held, name = [], weight
        form = self.rng.choice(["outer", "own", "constant"])
        if not weight and form == "outer":
            name = self.weight(*sizes)
        elif not weight:
            name = f"{out}_w"
            value = numpy_helper.from_array(self.array(*sizes), name)
            held = [value] if form == "own" else []
            inner = [] if held else [helper.make_node("Constant", [], [name], value=value)]
        inner.append(helper.make_node(op, [x, name], [out], name=self.name()))
        value_info = helper.make_tensor_value_info(out, TYPES[self.dtype], made)
        return helper.make_graph(inner, label, [], [value_info], held)

    def _loop(self, x: str, shape: tuple[int, ...]) -> None:
        if self.opset < 11:
            return
        width, at, kind = shape[-1], len(self.nodes), TYPES[self.dtype]
        steps = self.node("Constant", [], value=numpy_helper.from_array(np.array(2, np.int64)))
        go = self.node("Constant", [], value=numpy_helper.from_array(np.array(True)))
        weight = self.weight(width, width)
        inner = [
            helper.make_node("MatMul", [f"s{at}", weight], [f"m{at}"], name=self.name()),
            helper.make_node("Tanh", [f"m{at}"], [f"o{at}"]),
            helper.make_node("Identity", [f"c{at}"], [f"d{at}"]),
        ]
        ins = [
            helper.make_tensor_value_info(f"i{at}", TensorProto.INT64, []),
            helper.make_tensor_value_info(f"c{at}", TensorProto.BOOL, []),
            helper.make_tensor_value_info(f"s{at}", kind, shape),
        ]
        outs = [helper.make_tensor_value_info(f"d{at}", TensorProto.BOOL, []),
                helper.make_tensor_value_info(f"o{at}", kind, shape)]  # fmt: skip
        body = helper.make_graph(inner, "body", ins, outs)
        self.add(self.node("Loop", [steps, go, x], body=body), *shape)

    def _scan(self, x: str, shape: tuple[int, ...]) -> None:
        if self.opset < 11 or len(shape) != 2:
            return
        at, kind, n = len(self.nodes), TYPES[self.dtype], 3
        inner = [helper.make_node("MatMul", [f"r{at}", self.weight(shape[1], n)], [f"q{at}"], name=self.name())]
        ins = [helper.make_tensor_value_info(f"r{at}", kind, [shape[1]])]
        outs = [helper.make_tensor_value_info(f"q{at}", kind, [n])]
        body = helper.make_graph(inner, "body", ins, outs)
        self.add(self.node("Scan", [x], body=body, num_scan_inputs=1), shape[0], n)

    def _conv(self, x: str, shape: tuple[int, ...], group: int = 1) -> None:
        axes = len(shape) - 2
        kernel = [self.rng.choice([1, 1, 2, 3]) for _ in range(axes)]
        strides, dilations = ([self.rng.choice([1, 1, 2]) for _ in range(axes)] for _ in range(2))
        attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "dilations": dilations}
        if self.rng.random() < 0.3:
            attributes["auto_pad"] = self.rng.choice(["SAME_UPPER", "SAME_LOWER", "VALID"])
            attributes["dilations"] = dilations = [1] * axes
            sizes = [-(-s // t) for s, t in zip(shape[2:], strides, strict=True)]
            if attributes["auto_pad"] == "VALID":
                sizes = [(s - k) // t + 1 for s, k, t in zip(shape[2:], kernel, strides, strict=True)]
        else:
            pads = attributes["pads"] = [self.rng.choice([0, 1]) for _ in range(2 * axes)]
            walk = zip(shape[2:], kernel, strides, dilations, pads[:axes], pads[axes:], strict=True)
            sizes = [(s + a + b - (k - 1) * d - 1) // t + 1 for s, k, t, d, a, b in walk]
        n = self.rng.choice([1, 2, 6, 8]) * group
        if min(sizes) >= 1:
            inputs = [x, self.weight(n, shape[1] // group, *kernel)]
            inputs += [self.weight(n)] if self.rng.random() < 0.5 else []
            self.add(self.node("Conv", inputs, group=group, **attributes), shape[0], n, *sizes)

    def _grouped(self, x: str, shape: tuple[int, ...]) -> None:
        self._conv(x, shape, group=shape[1])

    def _transposed(self, x: str, shape: tuple[int, ...]) -> None:
        axes, n = len(shape) - 2, self.rng.choice([1, 2, 6])
        kernel, strides = ([self.rng.choice([1, 2, 2, 3]) for _ in range(axes)] for _ in range(2))
        pads = [self.rng.choice([0, 0, 1]) for _ in range(2 * axes)]
        walk = zip(shape[2:], kernel, strides, pads[:axes], pads[axes:], strict=True)
        sizes = [(s - 1) * t + k - a - b for s, k, t, a, b in walk]
        if min(sizes) >= 1 and math.prod(sizes) < 500:
            inputs = [x, self.weight(shape[1], n, *kernel)] + ([self.weight(n)] if self.rng.random() < 0.5 else [])
            made = self.node("ConvTranspose", inputs, kernel_shape=kernel, strides=strides, pads=pads)
            self.add(made, shape[0], n, *sizes)

    def _convnorm(self, x: str, shape: tuple[int, ...]) -> None:
        self._conv(x, shape)
        y = list(self.shapes)[-1]
        channels = self.shapes[y][1]
        variance = numpy_helper.from_array(np.abs(self.array(channels)) + np.ones(channels, self.dtype), f"v{y}")
        self.stored.append(variance)
        others = [self.weight(channels) for _ in range(3)]
        self.add(self.node("BatchNormalization", [y, *others, variance.name]), *self.shapes[y])

    def _pool(self, x: str, shape: tuple[int, ...]) -> None:
        if min(shape[2:]) > 1:
            self.add(self.node("MaxPool", [x], kernel_shape=[1] * (len(shape) - 2)), *shape)

    def _add(self, x: str, shape: tuple[int, ...]) -> None:
        other = self.rng.choice([name for name, found in self.shapes.items() if found == shape])
        self.add(self.node("Add", [x, other]), *shape)

    def _computed(self, x: str, shape: tuple[int, ...]) -> None:
        """A weight that nodes compute from constants."""
        weight = self.node("Add", [self.weight(shape[-1], 2), self.weight(shape[-1], 2)])
        self.add(self.node("MatMul", [x, weight]), *shape[:-1], 2)

    def _twice(self, x: str, shape: tuple[int, ...]) -> None:
        """Two readers of one weight."""
        weight = self.weight(shape[-1], 3)
        for _ in range(2):
            self.add(self.node("MatMul", [x, weight]), *shape[:-1], 3)

    def _shape(self, x: str, shape: tuple[int, ...]) -> None:
        self.add(self.node("Reshape", [x, self.node("Shape", [x])]), *shape)

    def _relu(self, x: str, shape: tuple[int, ...]) -> None:
        self.add(self.node("Relu" if self.opset >= 14 or self.dtype == "float32" else "Tanh", [x]), *shape)

    def _tanh(self, x: str, shape: tuple[int, ...]) -> None:
        self.add(self.node("Tanh", [x]), *shape)

    def _identity(self, x: str, shape: tuple[int, ...]) -> None:
        self.add(self.node("Identity", [x]), *shape)


def make(seed: int) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A random model and one feed for it; the same ones for the same seed."""
    rng = random.Random(seed)
    dtype = rng.choice(["float32"] * 12 + ["float16", "float16", "float64", "float64", "bfloat16"])
    opset, ir_version = rng.choice([7, 9, 11, 13, 15, 17, 20, 21]), rng.choice([3, 4, 7, 8, 9, 10])
    opset = max(opset, 13) if dtype == "bfloat16" else opset
    ir_version = 3 if opset < 11 and rng.random() < 0.4 else max(ir_version, 4)
    made = Maker(rng, dtype, opset, ir_version)
    image = rng.random() < 0.4
    made.wide = (96, 128, 160) if rng.random() < 0.1 else ()
    sizes = [1, rng.choice([1, 3, 4]), *rng.choices([4, 5, 7], k=rng.choice([1, 2, 2, 3]))]
    shape = tuple(sizes) if image else tuple(rng.choice([1, 2, 3]) for _ in range(rng.choice([0, 1, 1, 1, 2])))
    made.add("x", *shape if image else (*shape, rng.choice([2, 4, 8, *made.wide])))
    made.inputs["x"] = made.array(*made.shapes["x"])
    for turn in range(rng.randint(1, 9)):
        x = rng.choice(list(made.shapes)) if rng.random() < 0.3 else list(made.shapes)[-1]
        images = len(made.shapes[x]) > 2 and image
        usual = IMAGES if images else FLAT
        made.step(rng.choice((*usual, *(ANY if turn or rng.random() < 0.5 else ()))), x)
    return _model(made), made.inputs


def _model(made: Maker) -> onnx.ModelProto:
    rng, kind = made.rng, TYPES[made.dtype]
    if rng.random() < 0.1:
        made.inputs["label"] = np.array(["a", "ö"], object)
        made.node("Identity", ["label"], "label_out")
    graph = onnx.GraphProto(name="random", doc_string="a graph")
    order = list(made.nodes)
    if rng.random() < 0.1:
        rng.shuffle(order)
    graph.node.extend(order)
    graph.initializer.extend(made.stored)
    graph.sparse_initializer.extend(made.sparse)
    loose = rng.random() < 0.3
    for name, value in made.inputs.items():
        code = TensorProto.STRING if value.dtype == object else helper.np_dtype_to_tensor_dtype(value.dtype)
        dims = [f"{name}_{i}" if loose and name not in made.weights else n for i, n in enumerate(value.shape)]
        graph.input.append(helper.make_tensor_value_info(name, code, dims))
    if made.ir_version < 4:
        graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in made.stored)
    read = {name for node in made.nodes for name in node.input}
    results = [n for n in made.shapes if n not in read and n != "x"] or [list(made.shapes)[-1]]
    results += [n for n in made.shapes if n in read and n != "x" and rng.random() < 0.1]
    graph.output.extend(helper.make_tensor_value_info(n, kind, None) for n in results)
    if "label" in made.inputs:
        graph.output.append(helper.make_tensor_value_info("label_out", TensorProto.STRING, ["k"]))
    known = [n for n in made.shapes if n not in results and n != "x" and rng.random() < 0.3]
    graph.value_info.extend(helper.make_tensor_value_info(n, kind, made.shapes[n]) for n in known)
    if made.weights and rng.random() < 0.1:
        graph.quantization_annotation.add(tensor_name=rng.choice(list(made.weights)))
    domains = {"": made.opset, "com.microsoft": 1, "ai.extra": 3, **({"local": 1} if made.functions else {})}
    model = helper.make_model(
        graph, ir_version=made.ir_version, opset_imports=[helper.make_opsetid(d, v) for d, v in domains.items()]
    )
    model.functions.extend(made.functions)
    helper.set_model_props(model, {"made": "by a fuzzer"})
    for name, value in list(made.inputs.items()):
        if name in made.weights:
            del made.inputs[name], value  # the caller leaves it as it is
    return model
