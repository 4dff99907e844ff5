"""Break a model file, or its data file, and hand it to the loader and the command line: one line, or it works.

Mutations: flipped bits, cut ends, inserted, repeated and moved pieces, other field lengths, and in the parsed model
other dims, types, offsets, lengths, locations, names, inputs and attributes.
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import TensorProto

from onnx_lowrank import cli
from onnx_lowrank.errors import LowRankError
from onnx_lowrank.files import copy_model, read_model, read_tensor, write_model
from onnx_lowrank.graph import Graph
from onnx_lowrank.passes.dense import dense_fragment  # noqa: F401  the pass is imported as the rewriting does
from onnx_lowrank.passes.survey import survey
from onnx_lowrank.rewrite import dense_patch
from onnx_lowrank.tensors import tensors_of

LOCATIONS = ("../outside", "/etc/passwd", "", ".", "data\0", "c:\\x", "sub/../../x", "data" * 80, "model.onnx", "ü")
NUMBERS = (-1, 0, 1, 7, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)


class WrongError(AssertionError):
    """What must never happen, in one line."""


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four random changes."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 400) + 1)
        size = rng.choice([1, 2, 8, 64])
        change = rng.choice(["flip", "flip", "flip", "byte", "cut", "insert", "repeat", "drop", "move"])
        if change == "flip" and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif change == "byte" and at < len(data):
            data[at] = rng.choice([0, 1, 127, 128, 255])
        elif change == "cut":
            del data[at:]
        elif change == "insert":
            data[at:at] = rng.randbytes(size)
        elif change == "repeat":
            data[at:at] = data[at : at + size]
        elif change == "drop":
            del data[at : at + size]
        elif change == "move":
            piece = bytes(data[at : at + size])
            data[rng.randrange(len(data) + 1) :][:size] = piece
    return bytes(data)


def restructured(content: bytes, rng: random.Random) -> bytes:
    """The same model with one to three of its fields changed: it still parses."""
    model = onnx.ModelProto()
    model.ParseFromString(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        rng.choice(FIELDS)(model, rng)
    with contextlib.suppress(EncodeError, ValueError):
        return model.SerializeToString()
    return content


def _dims(model: onnx.ModelProto, rng: random.Random) -> None:
    tensors = [t for t in tensors_of(model) if t.dims]
    if tensors:
        tensor = rng.choice(tensors)
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)


def _rank(model: onnx.ModelProto, rng: random.Random) -> None:
    if tensors := list(tensors_of(model)):
        tensor = rng.choice(tensors)
        if rng.random() < 0.5:
            tensor.ClearField("dims")
        else:
            tensor.dims.append(rng.choice([0, 1, 2]))


def _type(model: onnx.ModelProto, rng: random.Random) -> None:
    if tensors := list(tensors_of(model)):
        rng.choice(tensors).data_type = rng.choice([0, 2, 6, 7, 8, 10, 11, 16, 17, 22, 23, 99, -3])


def _data(model: onnx.ModelProto, rng: random.Random) -> None:
    if tensors := list(tensors_of(model)):
        tensor = rng.choice(tensors)
        choice = rng.choice(["none", "short", "both", "nan"])
        raw = tensor.raw_data
        if choice == "none":
            tensor.ClearField("raw_data")
        elif choice == "short":
            tensor.raw_data = raw[: len(raw) // 2]
        elif choice == "both":
            tensor.float_data.append(1.0)
        else:
            tensor.raw_data = b"\xff" * len(raw)


def _external(model: onnx.ModelProto, rng: random.Random) -> None:
    if tensors := list(tensors_of(model)):
        tensor = rng.choice(tensors)
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[rng.randrange(len(tensor.external_data) + 1) :]
        key = rng.choice(["location", "offset", "length", "checksum"])
        value = rng.choice(LOCATIONS) if key == "location" else str(rng.choice([*NUMBERS, "x", " 1", "0x8", "١"]))
        with contextlib.suppress(ValueError):
            tensor.external_data.add(key=key, value=value)


def _wire(model: onnx.ModelProto, rng: random.Random) -> None:
    if nodes := [n for n in model.graph.node if n.input]:
        node, other = rng.choice(nodes), rng.choice(nodes)
        names = [*other.output, *other.input, "", "nowhere"]
        node.input[rng.randrange(len(node.input))] = rng.choice(names)


def _unwire(model: onnx.ModelProto, rng: random.Random) -> None:
    if nodes := list(model.graph.node):
        node = rng.choice(nodes)
        node.ClearField(rng.choice(["input", "output", "attribute", "name"]))


def _operator(model: onnx.ModelProto, rng: random.Random) -> None:
    if nodes := list(model.graph.node):
        node = rng.choice(nodes)
        node.op_type = rng.choice(
            ["MatMul", "Conv", "Gemm", "Identity", "Transpose", "Cast", "Constant", "Nonsense", "If"]
        )
        node.domain = rng.choice(["", "", "com.microsoft", "nowhere"])


def _attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    if found := [(n, a) for n in model.graph.node for a in n.attribute]:
        node, attribute = rng.choice(found)
        if rng.random() < 0.5:
            node.attribute.remove(attribute)
            return
        attribute.type = rng.choice(range(15))
        attribute.i = rng.choice(NUMBERS)
        attribute.ints.append(rng.choice(NUMBERS))


def _names(model: onnx.ModelProto, rng: random.Random) -> None:
    for many in (model.graph.initializer, model.graph.input, model.graph.output):
        if many and rng.random() < 0.5:
            rng.choice(many).name = rng.choice(["", "x", rng.choice(many).name])


def _lists(model: onnx.ModelProto, rng: random.Random) -> None:
    many = rng.choice(
        [model.graph.node, model.graph.initializer, model.graph.input, model.graph.output, model.opset_import]
    )
    if many:
        at = rng.randrange(len(many))
        if rng.random() < 0.5:
            many.add().CopyFrom(many[at])
        else:
            del many[at]


def _versions(model: onnx.ModelProto, rng: random.Random) -> None:
    model.ir_version = rng.choice([0, 1, 3, 8, 99, -1, 2**40])
    if model.opset_import:
        model.opset_import[0].version = rng.choice([0, 1, 6, 13, 99, -5])


FIELDS: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    _dims, _dims, _rank, _type, _data, _external, _external, _wire, _unwire, _operator, _attribute, _names, _lists,
    _versions,
)  # fmt: skip


def load(path: Path, folder: Path) -> str:
    """Everything that needs no runtime: read, survey, rewrite densely, write, copy. `refused` or `loaded`.

    Raises:
        WrongError: a partial file, or several lines.
    """
    before = {p.name for p in folder.iterdir()}
    out = folder / "out.onnx"
    try:
        file = read_model(path)
        for tensor in tensors_of(file.model):
            with contextlib.suppress(LowRankError):
                read_tensor(tensor, file.folder)
        graph = Graph(file.model, file.folder)
        for site in survey(graph).sites:
            graph.apply(dense_patch(site, "fuzz"))
        write_model(graph.commit(), out, folder=file.folder, external=len(file.model.graph.node) % 2 == 0)
        read_model(out)
        out.unlink()
        copy_model(file, out)
    except LowRankError as fault:
        if out.exists() or "\n" in str(fault):
            raise WrongError(f"refused, but not in one line or with a file: {fault}") from None
        return "refused"
    finally:
        out.unlink(missing_ok=True)
        for data in folder.glob("out.onnx.*.data"):
            data.unlink()
        if left := {p.name for p in folder.iterdir()} - before:
            raise WrongError(f"left behind: {left}")
    return "loaded"


def command(path: Path, words: Sequence[str]) -> str:
    """The command line on a file, in this process: its exit code.

    Raises:
        WrongError: a traceback, another exit code than 0, 2, 3 and 4, several lines, or a partial file.
    """
    out, error = path.with_name("out.onnx"), io.StringIO()
    argv = ["onnx-lowrank", "optimize", str(path), "-o", str(out), "-q", *words]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stderr(error), contextlib.redirect_stdout(error):
        code = cli.run()
    said = error.getvalue()
    if code not in (0, 2, 3, 4) or "Traceback" in said or "internal error" in said:
        raise WrongError(f"exit {code}: {said[-300:]}")
    if code and (out.exists() or said.count("\n") > 1):
        raise WrongError(f"exit {code} with a file or several lines: {said[-300:]}")
    if not code:
        read_model(out)
    out.unlink(missing_ok=True)
    return f"exit {code}"


def broken(content: bytes, rng: random.Random) -> bytes:
    """The bytes of a model, changed one way or the other."""
    with contextlib.suppress(DecodeError):
        if rng.random() < 0.6:
            return restructured(content, rng)
    return mutated(content, rng)
