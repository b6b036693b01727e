"""A sealed stream gives the messages that were written, in their order, or ends; and fields of a newer peer do not end it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from workers.errors import StreamDamaged
from workers.handoff.protobuf import down_from_pb, up_from_pb
from workers.pb import worker_pb2 as pb
from workers.wire import attach_protobuf as wire
from workers.wire.streams import Sealer, Unsealer, verified


def frames(num: int = 4) -> list[bytes]:
    sealer = Sealer()
    return [
        sealer.seal(
            pb.WorkerFrame(generation=7, outputs=[pb.Output(request_id="r", token_ids=[i, i + 1])])
        ).SerializeToString()
        for i in range(num)
    ]


async def read(raws: Iterable[bytes]) -> list[pb.WorkerFrame]:
    async def stream() -> AsyncIterator[pb.WorkerFrame]:
        for raw in raws:
            yield pb.WorkerFrame.FromString(raw)

    return [message async for message in verified(stream())]


async def test_what_is_written_is_read() -> None:
    assert [list(message.outputs[0].token_ids) for message in await read(frames())] == [[i, i + 1] for i in range(4)]


@pytest.mark.parametrize(
    "change", [lambda f: f[:1] + f[2:], lambda f: [f[0], *f], lambda f: [f[1], f[0], *f[2:]], lambda f: f[1:]]
)
async def test_a_message_that_is_lost_repeated_or_overtaken_ends_the_stream(change) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(StreamDamaged):
        await read(change(frames()))


def test_a_message_that_could_not_be_parsed_ends_the_stream() -> None:
    with pytest.raises(StreamDamaged):
        Unsealer().check(None)


async def test_a_message_whose_bytes_are_no_message_ends_the_stream() -> None:
    with pytest.raises(StreamDamaged):
        await read([frames(1)[0], b"\xff\xff"])


@pytest.mark.parametrize("num_sealed", [0, 1])
async def test_seals_cannot_be_left_out(num_sealed: int) -> None:
    with pytest.raises(StreamDamaged):
        await read([*frames(num_sealed), pb.WorkerFrame(generation=7).SerializeToString()])


# ---- fields that only a newer version knows ----

STREAMED: dict[type[Message], Callable[[Any], Any]] = {
    pb.RouterMessage: wire.router_message_from_pb,
    pb.WorkerFrame: wire.frame_from_pb,
    pb.HandoffDown: down_from_pb,
    pb.HandoffUp: up_from_pb,
}
ASKED: dict[type[Message], Callable[[Any], Any]] = {
    pb.WorkerStatus: wire.status_from_pb,
    pb.SetRoleRequest: lambda message: (message.role, message.generation),
    pb.SetDrainingRequest: lambda message: (message.is_draining, message.generation),
    pb.DescribeRequest: lambda message: None,
}
NAMES = {"role": "decode", "finish_reason": "stop", "refusal": "internal_error"}
"""Strings that stand for members of an enum."""


def filled(kind: Descriptor, choice: int, choice_inside: int, depth: int = 0) -> Message:
    """A message with every field set; of a oneof the one with this number, or the last, of those inside of it another."""
    message: Any = GetMessageClass(kind)()
    for field in kind.fields:
        oneof = field.containing_oneof
        if oneof is not None and field is not oneof.fields[min(choice, len(oneof.fields) - 1)]:
            continue
        if field.message_type is not None:
            if depth > 4:  # HandoffUp holds some of its own kind
                continue
            inner = filled(field.message_type, choice_inside, choice_inside, depth + 1)
            getattr(message, field.name).MergeFrom([inner] if field.is_repeated else inner)
        elif field.is_repeated:
            getattr(message, field.name).extend([1, 1] if field.type != FieldDescriptor.TYPE_STRING else ["x"])
        elif field.type == FieldDescriptor.TYPE_STRING:
            setattr(message, field.name, NAMES.get(field.name, "x"))
        else:
            setattr(message, field.name, b"\1\0\0\0" if field.type == FieldDescriptor.TYPE_BYTES else 1)
    return message


def inside(message: Any) -> Iterator[Any]:
    """The message and all messages in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from inside(inner)


def with_news(message: Any, place: int) -> tuple[Any, Descriptor]:
    """What a newer peer would send: message number `place` in it has more fields, below, between and above those known here."""
    newer = type(message)()
    newer.CopyFrom(message)
    changed = list(inside(newer))[place]
    for number in set(range(1, 40)) | {1000, (1 << 29) - 1}:
        if number not in changed.DESCRIPTOR.fields_by_number:
            tag = bytearray()
            left = number << 3
            while left:
                tag.append(left & 0x7F | (0x80 if left > 0x7F else 0))
                left >>= 7
            changed.MergeFromString(bytes(tag) + b"\x01")
    return newer, changed.DESCRIPTOR


def test_fields_that_only_a_newer_peer_knows_change_nothing_in_any_message() -> None:
    seen: set[str] = set()
    for kind, read_value in (STREAMED | ASKED).items():
        num_choices = max([1, *(len(oneof.fields) for oneof in kind.DESCRIPTOR.oneofs)])
        for choice, choice_inside in itertools.product(range(num_choices), range(3)):
            message: Any = filled(kind.DESCRIPTOR, choice, choice_inside)
            if kind in STREAMED:
                message.number = 1
            for place in range(sum(1 for _ in inside(message))):
                newer, changed = with_news(message, place)
                parsed = kind.FromString(newer.SerializeToString())
                assert len(newer.SerializeToString()) > len(message.SerializeToString())
                if kind in STREAMED:
                    Unsealer().check(parsed)
                assert read_value(parsed) == read_value(message)
                seen.add(changed.full_name)
    assert seen == {kind.full_name for kind in pb.DESCRIPTOR.message_types_by_name.values()}
