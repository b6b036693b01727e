"""Translates what leader and ranks say between values and frames: a length, then a protobuf message. Knows no socket."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

from google.protobuf.message import DecodeError

from workers.group.messages import BadMessage, Message
from workers.pb import group_pb2 as pb

MAX_FRAME_BYTES = 256 << 20
"""A step's tokens and its results are far smaller."""
PREFIX_BYTES = 4

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Message)}
_ENTRIES = {field.message_type.name: field.name for field in pb.Frame.DESCRIPTOR.fields}
_FIELDS = {name: get_type_hints(kind) for name, kind in _KINDS.items()}
assert _KINDS.keys() == _ENTRIES.keys()


def encode(message: Message) -> bytes:
    """The frame of a message: its length (4 bytes, little endian) and the message."""
    name = type(message).__name__
    frame = pb.Frame()
    entry: Any = getattr(frame, _ENTRIES[name])
    entry.SetInParent()
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if not isinstance(value, list):
            setattr(entry, field.name, value)
        elif _FIELDS[name][field.name] == list[int]:
            getattr(entry, field.name).extend(value)
        else:
            getattr(entry, field.name).extend(pb.Ints(values=row) for row in value)
    data: bytes = frame.SerializeToString()
    return len(data).to_bytes(PREFIX_BYTES, "little") + data


def length(prefix: bytes) -> int:
    """Of the message, from a frame's first bytes. Raises BadMessage above the bound."""
    found = int.from_bytes(prefix, "little")
    if found > MAX_FRAME_BYTES:
        raise BadMessage(f"a frame of {found} bytes is above the bound of {MAX_FRAME_BYTES}")
    return found


def decode(data: bytes) -> Message:
    """Raises BadMessage when the bytes are no message that this version knows."""
    try:
        frame = pb.Frame.FromString(data)
    except DecodeError as error:
        raise BadMessage(f"not a message: {error}") from error
    chosen = frame.WhichOneof("message")
    if chosen is None:
        raise BadMessage("a message of a kind that is not known")
    entry: Any = getattr(frame, chosen)
    name = type(entry).__name__
    values = {}
    for field, kind in _FIELDS[name].items():
        value = getattr(entry, field)
        if kind == list[int]:
            value = list(value)
        elif kind == list[list[int]]:
            value = [list(row.values) for row in value]
        values[field] = value
    message: Message = _KINDS[name](**values)
    return message
