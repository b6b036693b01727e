"""Writes what the leader and its ranks say as protobuf, and reads it. Knows no socket."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

from google.protobuf.message import DecodeError

from workers.group.messages import BadMessage, Done, Message, Step
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
    match message:
        case Step():
            frame = pb.Frame(step=_step_to_pb(message))
        case Done():
            frame = pb.Frame(done=_done_to_pb(message))
        case _:
            frame = _frame_of(message)
    data: bytes = frame.SerializeToString()
    return len(data).to_bytes(PREFIX_BYTES, "little") + data


# What the leader says to every rank and hears from every rank in every step is written and read by hand, the rest by its fields.


def _step_to_pb(step: Step) -> pb.Step:
    return pb.Step(
        epoch=step.epoch,
        number=step.number,
        role=step.role,
        generation=step.generation,
        halves=step.halves,
        wants_load=step.wants_load,
        moved_layer=step.moved_layer,
        moved_slots=step.moved_slots,
        num_prefill=step.num_prefill,
        num_decode=step.num_decode,
        tail=step.tail,
    )


def _step_from_pb(step: pb.Step) -> Step:
    return Step(
        step.epoch,
        step.number,
        step.role,
        step.generation,
        step.halves,
        step.wants_load,
        step.moved_layer,
        list(step.moved_slots),
        step.num_prefill,
        step.num_decode,
        step.tail,
    )


def _done_to_pb(done: Done) -> pb.Done:
    return pb.Done(
        epoch=done.epoch,
        number=done.number,
        step_s=done.step_s,
        generation=done.generation,
        sent_bytes=done.sent_bytes,
        load=[pb.Ints(values=row) for row in done.load],
        tail=done.tail,
    )


def _done_from_pb(done: pb.Done) -> Done:
    load = [list(row.values) for row in done.load]
    return Done(done.epoch, done.number, done.step_s, done.generation, done.sent_bytes, load, done.tail)


def _frame_of(message: Message) -> pb.Frame:
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
    return frame


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
    if chosen == "step":
        return _step_from_pb(frame.step)
    if chosen == "done":
        return _done_from_pb(frame.done)
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
