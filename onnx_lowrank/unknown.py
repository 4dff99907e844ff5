"""Fields of a message that this version of ONNX does not know, as bytes: copying field by field would lose them."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message  # type: ignore[import-untyped, unused-ignore]


def copy_unknown(source: Message, target: Message) -> None:
    """Give `target` the unknown fields of `source` itself, not of the messages in it."""
    try:
        from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped, unused-ignore]
    except ImportError:  # an old protobuf
        return
    if content := b"".join(_encoded(field) for field in UnknownFieldSet(source)):
        target.MergeFromString(content)


def _encoded(field: Any) -> bytes:
    number, wire = int(field.field_number), int(field.wire_type)
    tag = _varint(number << 3 | wire)
    if wire == 0:
        return tag + _varint(int(field.data))
    if wire in (1, 5):
        return tag + int(field.data).to_bytes(8 if wire == 1 else 4, "little")
    if wire == 2:
        return tag + _varint(len(field.data)) + bytes(field.data)
    return tag + b"".join(map(_encoded, field.data)) + _varint(number << 3 | 4)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes((*found, value))
