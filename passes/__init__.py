"""The passes, one rewrite a file, and their order: literal tuples, read top to bottom."""

from __future__ import annotations

from typing import Final

if __name__ != "onnx_lowrank.passes":
    raise ImportError("import onnx_lowrank.passes, not passes")

from onnx_lowrank.fragment import Kind
from onnx_lowrank.passes.asym3d import ASYM3D
from onnx_lowrank.passes.branch import BRANCH2, BRANCH4, BRANCH8
from onnx_lowrank.passes.conv_svd import CONV_SVD
from onnx_lowrank.passes.pivot import PIVOT
from onnx_lowrank.passes.spatial import SPATIAL
from onnx_lowrank.passes.svd import SVD
from onnx_lowrank.passes.tucker import TUCKER

KINDS: Final[tuple[Kind, ...]] = (SVD, CONV_SVD, SPATIAL, ASYM3D, TUCKER, BRANCH2, BRANCH4, BRANCH8, PIVOT)
