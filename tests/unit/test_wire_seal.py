"""A sealed stream gives the messages that were written, in their order, or ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import StreamDamaged
from workers.pb import worker_pb2 as pb
from workers.wire_seal import Sealer, Unsealer, verified


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


@given(st.integers(0, 10_000))
def test_no_single_changed_bit_goes_unnoticed_unless_it_changes_nothing(place: int) -> None:
    first, second = frames(2)
    spoiled = bytearray(second)
    spoiled[place // 8 % len(second)] ^= 1 << place % 8
    unsealer = Unsealer()
    unsealer.check(pb.WorkerFrame.FromString(first))
    try:
        message = pb.WorkerFrame.FromString(bytes(spoiled))
    except Exception:
        return  # gRPC hands out None then, which is refused
    with pytest.raises(StreamDamaged):
        unsealer.check(message)


def test_a_message_that_could_not_be_parsed_ends_the_stream() -> None:
    with pytest.raises(StreamDamaged):
        Unsealer().check(None)


async def test_a_message_whose_bytes_are_no_message_ends_the_stream() -> None:
    with pytest.raises(StreamDamaged):
        await read([frames(1)[0], b"\xff\xff"])


async def test_a_stream_without_seals_is_taken_as_it_is() -> None:
    raw = pb.WorkerFrame(generation=7).SerializeToString()
    assert len(await read([raw, raw])) == 2


async def test_seals_cannot_be_left_out_in_mid_stream() -> None:
    with pytest.raises(StreamDamaged):
        await read([frames(1)[0], pb.WorkerFrame(generation=7).SerializeToString()])
