"""Data files that are links, as model hubs lay them out: seen from where the data really is.

    snapshots/m.onnx -> ../blobs/a                     m with w in 'b', its folder blobs
    snapshots/w.bin  -> ../blobs/b      followed:

The runtime reads data through such links for a model that it opens by its path: what is linked has to lie where the
model file itself really lies. A model that it is given as bytes has no such place.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from onnx_lowrank.tensors import data_files, is_external, tensors_of


def followed(model: onnx.ModelProto, folder: Path) -> tuple[onnx.ModelProto, Path]:
    """A model with the folder of its external data, so that no data file is a link that leads out of that folder.

    It is the given model where that holds already, else a copy with other locations.

    Raises:
        ModelError: the external data is not as it says (see `tensors.stored`).
    """
    real = {location: file.resolve() for location, file in data_files(model, folder).items()}
    root = folder.resolve()
    if all(file.is_relative_to(root) for file in real.values()):
        return model, folder
    try:
        common = Path(os.path.commonpath([file.parent for file in real.values()]))
    except ValueError:  # on several drives
        return model, folder
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in filter(is_external, tensors_of(copy)):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = real[Path(os.path.normpath(entry.value)).as_posix()].relative_to(common).as_posix()
    return copy, common
