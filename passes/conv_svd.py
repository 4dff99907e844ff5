"""Split a Conv into a thin Conv and a 1×1 Conv.

    before   x -[ Conv  N×C×k×k, b ]-> y
    after    x -[ Conv  r×C×k×k ]- t -[ Conv  N×r×1×1, b ]-> y

Exact at full rank; at rank r the least squares solution on the patches of the calibration samples, found from
the covariance of the *output* alone (Gram form, ALGORITHMS §1). Strides, pads and dilations go to the first
Conv, the bias to the second, where the runtime fuses Conv+Add+Relu. Cost r(Ck²+N) multiply-adds.
A grouped convolution becomes two of as many groups, all of the same rank (each has its own closed form): r(gCk²+N).
A ConvTranspose C→N becomes one C→r and a 1×1 Conv r→N, the same closed form on its output.
Left alone: 1×1 convolutions (`svd` has them), depthwise ones.
"""

from __future__ import annotations

from onnx_lowrank.fragment import Kind
from onnx_lowrank.passes.svd import two_factor_cost, two_factors

CONV_SVD = Kind(
    name="conv_svd", applies=lambda geometry: not geometry.pointwise, cost=two_factor_cost, build=two_factors
)
