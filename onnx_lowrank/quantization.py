"""int8 and fp16 models out of float32 ones: ONNX Runtime's own converters, fenced and lazily imported.

x -[ Conv W ]-> y   becomes   x -[ Q ]-[ DQ ]-[ Conv DQ(W8) ]-[ Q ]-[ DQ ]-> y   (static; the runtime fuses it)
x -[ MatMul W ]-> y becomes   x -[ DynamicQuantizeLinear ]-[ MatMulInteger W8 ]-[ Cast ]-[ Mul ]-> y   (dynamic)

Activations are unsigned with a zero point, weights signed and symmetric, a scale for each output channel: the
combination that the runtime's VNNI kernels are written for (decision 020).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import helper

from onnx_lowrank.errors import ModelError

Range = tuple[float, float]
"""Least and largest value of a tensor."""

OPSET = 13
"""Scales by channel need it."""

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MOVING = (
    *("Relu", "Clip", "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split"),
    *("Concat", "Resize", "Pad", "Gather"),
)
_INFERRED = ("onnx.infer", "onnxruntime.quant")  # the mark of a model whose types are known


def static(
    model: onnx.ModelProto, ranges: Mapping[str, Range], *, exclude: Collection[str] = (), linear_only: bool = False
) -> onnx.ModelProto:
    """A quantised model with QuantizeLinear and DequantizeLinear pairs.

    Args:
        model: weights inside, every node named, weights of linear operators as initializers; not changed.
        ranges: of every float tensor that is computed or fed.
        exclude: names of nodes that stay in float.
        linear_only: leave elementwise arithmetic, pooling by mean and activation functions in float.
    """
    from onnxruntime.quantization import QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    typed = _typed(model, ranges)
    pairs = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    kinds = [*LINEAR, *_MOVING] if linear_only else sorted({*QDQRegistry, *QLinearOpsRegistry})
    quantizer = QDQQuantizer(
        typed,
        True,
        False,
        QuantType.QInt8,
        QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, pairs),
        [],
        sorted(exclude),
        kinds,
        {},
    )
    return _finished(_quietly(quantizer), model)


def dynamic(model: onnx.ModelProto, floats: Collection[str], *, exclude: Collection[str] = ()) -> onnx.ModelProto:
    """A model whose MatMul and Gemm weights are int8 and whose activations are quantised as they come.

    Args:
        model, exclude: as for `static`.
        floats: names of all float tensors.
    """
    from onnxruntime.quantization import QuantizationMode, QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer

    quantizer = ONNXQuantizer(
        _typed(model, floats),
        True,
        False,
        QuantizationMode.IntegerOps,
        False,
        QuantType.QInt8,
        QuantType.QUInt8,
        None,
        [],
        sorted(exclude),
        ["MatMul", "Gemm"],
        {"MatMulConstBOnly": True},
    )
    return _finished(_quietly(quantizer), model)


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in float16; inputs and outputs keep their types.

    Raises:
        ModelError: the converter cannot work on it.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    level = logging.root.level
    logging.disable(logging.WARNING)
    try:
        found: onnx.ModelProto = convert_float_to_float16(copy, keep_io_types=True, force_fp16_initializers=False)
    except Exception as fault:  # the converter's failures share no base class
        raise ModelError(f"the model cannot be converted to fp16: {' '.join(str(fault).split())[:200]}") from None
    finally:
        logging.disable(logging.NOTSET)
        logging.root.setLevel(level)
    return found


def _quietly(quantizer: object) -> onnx.ModelProto:
    """Run a quantizer; its advice to users of its own command line is of no use here.

    Raises:
        ModelError: it cannot work on the model.
    """
    logging.disable(logging.WARNING)
    try:
        quantizer.quantize_model()  # type: ignore[attr-defined]
        quantizer.model.topological_sort()  # type: ignore[attr-defined]
        found: onnx.ModelProto = quantizer.model.model  # type: ignore[attr-defined]
        return found
    except Exception as fault:  # its failures share no base class
        raise ModelError(f"the model cannot be quantised: {' '.join(str(fault).split())[:200]}") from None
    finally:
        logging.disable(logging.NOTSET)


def _typed(model: onnx.ModelProto, floats: Collection[str]) -> onnx.ModelProto:
    """A copy that says which tensors are float32, so that no shape inference is needed, which knows fewer operators."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {v.name for v in (*copy.graph.value_info, *copy.graph.input, *copy.graph.output)}
    made = {name for node in copy.graph.node for name in node.output}
    for name in sorted(made.intersection(floats) - known):
        copy.graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    for value in copy.graph.output:  # without a type the quantizer would take a Relu away and not clip in its place
        if value.name in floats and not value.type.HasField("tensor_type"):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    copy.metadata_props.add(key=_INFERRED[0], value=_INFERRED[1])
    return copy


def _finished(found: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """Without what was added for the quantizer: its mark and the types of tensors."""
    kept = [p for p in found.metadata_props if (p.key, p.value) != _INFERRED]
    del found.metadata_props[:]
    found.metadata_props.extend(kept)
    before = list(model.graph.value_info)
    del found.graph.value_info[:]
    made = {name for node in found.graph.node for name in node.output}
    found.graph.value_info.extend(v for v in before if v.name in made)
    return found
