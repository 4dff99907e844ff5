"""One run of a session again and again, with its inputs and outputs left where the provider keeps its tensors."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

_WORDS: Final = {"bfloat16": (np.uint16, onnx.TensorProto.BFLOAT16)}
"""Types that NumPy does not know by itself: the words that carry them, and their number in ONNX."""


class Bound:
    """A session with one feed bound to its device; calling it runs once and waits until the device is done.

    Inputs are moved when they are bound; outputs get their place in the first run and keep it, as a captured graph
    needs. On the CPU nothing is moved: then it is a run without copies of the outputs.

    Args:
        ort: the onnxruntime module.
        session: an InferenceSession.
        feed: arrays by input name; bfloat16 is that of ml_dtypes.
        outputs: names of the outputs, all tensors.
        device: `cpu` or `cuda`, and its number.
    """

    def __init__(
        self,
        ort: Any,
        session: Any,
        feed: Mapping[str, npt.NDArray[Any]],
        outputs: Sequence[str],
        device: tuple[str, int],
    ) -> None:
        self._ort, self._session, self._device = ort, session, device
        self._values = {name: self._value(array) for name, array in feed.items()}
        self._binding = session.io_binding()
        self._bind(self._binding)
        for name in outputs:
            self._binding.bind_output(name, *device)

    def _value(self, array: npt.NDArray[Any]) -> Any:
        array = np.ascontiguousarray(array)
        if array.dtype.name in _WORDS:
            words, number = _WORDS[array.dtype.name]
            return self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(words), number)
        return self._ort.OrtValue.ortvalue_from_numpy(array)

    def _bind(self, binding: Any) -> None:
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
        binding.synchronize_inputs()

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def outputs(self) -> list[Any]:
        """The outputs of the last run, on the host."""
        return list(self._binding.copy_outputs_to_cpu())

    def places(self) -> list[tuple[str, int]]:
        """Device and address of each output of the last run."""
        return [(value.device_name().lower(), int(value.data_ptr())) for value in self._binding.get_outputs()]

    def transfers(self, runs: int = 9) -> dict[str, float]:
        """Median milliseconds to move the inputs to the device, and the outputs of the last run to the host."""
        times = np.zeros((runs, 2))
        for row in times:
            since = time.perf_counter()
            self._bind(self._session.io_binding())
            row[0] = time.perf_counter() - since
            since = time.perf_counter()
            self._binding.copy_outputs_to_cpu()
            row[1] = time.perf_counter() - since
        inputs, outputs = np.median(times, axis=0) * 1e3
        return {"inputs_ms": float(inputs), "outputs_ms": float(outputs)}
