"""One session for all probes: the model with its sites' weights as inputs, so that a run may override one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx

from onnx_lowrank.calibration import Fits, fitted, narrow_fit
from onnx_lowrank.graph import Graph
from onnx_lowrank.linalg import Array, grouped_product
from onnx_lowrank.metrics import RelativeLoss
from onnx_lowrank.passes.dense import dense_fragment
from onnx_lowrank.prepare import Loaded
from onnx_lowrank.rewrite import dense_patch
from onnx_lowrank.runtime import Session, with_outputs
from onnx_lowrank.settings import Settings
from onnx_lowrank.sites import Site
from onnx_lowrank.validation import References


class Probes:
    """The original on a few calibration samples, ready to run with one site's weight replaced.

    Read are the outputs before a final Softmax, by the relative squared error, whatever the metric is: it ranks
    sites also where a metric of the task does not move on a few samples.

    Args:
        sites: those that may be probed.
        samples: how many calibration samples, at most.

    Attributes:
        samples: how many there are.
        seconds: what the original took for one of them, in the session of the probes.
    """

    def __init__(self, loaded: Loaded, sites: Sequence[Site], fits: Fits, settings: Settings, samples: int) -> None:
        self._fits = fits
        self._sites = {site.name: site for site in sites}
        graph = Graph(loaded.file.model, loaded.file.folder)
        self._names = {site.name: graph.apply(dense_patch(site, "probe")) for site in sites}
        model = with_outputs(_overridable(graph.commit(), self._names), loaded.graph.smooth_outputs())
        self._session = Session(model, provider=settings.provider, threads=0, folder=loaded.file.folder)
        chosen = list(itertools.islice(loaded.calibration, samples))
        began = time.perf_counter()
        self._references = References(self._session, chosen, RelativeLoss)
        self.samples = self._references.count
        self.seconds = (time.perf_counter() - began) / max(self.samples, 1)

    def loss(self, node: str, rank: int) -> float:
        """Loss of the outputs when one site is the best approximation of that rank."""
        site, fit = self._sites[node], self._fits[node]
        left, right, bias = fitted(site, fit, rank)
        return self._loss(site, grouped_product(left, right, site.geometry.groups), bias)

    def narrow_loss(self, node: str, width: int) -> float:
        """Loss of the outputs when one site reads the best so many channels of a hidden layer."""
        site, fit = self._sites[node], self._fits[node]
        return self._loss(site, *narrow_fit(site, fit, width))

    def _loss(self, site: Site, weight: Array, bias: Array) -> float:
        node, fragment = site.name, dense_fragment(site.geometry, weight, bias)
        fed: dict[str, npt.NDArray[Any]] = {
            self._names[node][local]: array for local, array in fragment.constants.items()
        }
        return self._references.loss(self._session, fed).value()


def _overridable(model: onnx.ModelProto, names: Mapping[str, Mapping[str, str]]) -> onnx.ModelProto:
    """List the sites' constants as inputs too: from IR 4 on a caller may override such initializers."""
    wanted = {name for given in names.values() for name in given.values()}
    listed = {i.name for i in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name in wanted - listed:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.ir_version = max(model.ir_version, 4)
    return model
