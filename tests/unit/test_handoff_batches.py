"""What a sender has to say at once goes in one write, to receivers that can read that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from builders import fake_layout

from workers.handoff.protobuf import down_to_pb, up_from_pb
from workers.handoff.protocol.messages import (
    CancelHandoff,
    HandoffAccepted,
    HandoffDown,
    HandoffUp,
    KvPieces,
    Offer,
    PrefillDone,
    UseTransport,
)
from workers.handoff.protocol.source_session import Filled, SourceSession
from workers.handoff.source_driver import MAX_BATCH, ExportFeed, SourceDriver
from workers.kv_memory.memory import KvMemory
from workers.kv_memory.pieces import Cut
from workers.pb import worker_pb2 as pb
from workers.status import WorkerAddress
from workers.transports.same_host import LoopbackTransport
from workers.wire.streams import Sealer

RECEIVER = WorkerAddress("decode-0", 1, "127.0.0.1:1")
LAYOUT = fake_layout()


class Prompt:
    """An export that `compute` fills, as an engine does: the last blocks and the first token in one report."""

    def __init__(self, cut: Cut, feed: ExportFeed) -> None:
        self._cut, self._feed = cut, feed

    is_paced = False

    def start(self) -> None: ...

    def acknowledged(self, num_pieces: int) -> None: ...

    def compute(self) -> None:
        end = self._cut.num_blocks
        self._feed(Filled(tuple(range(end)), 0, end, LAYOUT.num_layers))
        self._feed(PrefillDone(17, None, self._cut.num_pieces, 0, 0.0))

    def release(self, reason: str) -> None: ...


async def writes_of_a_prompt(takes_batches: bool) -> list[list[HandoffUp]]:
    """What each write of the sender says, up to the end of the prompt."""
    memory, cut = KvMemory(LAYOUT), Cut(LAYOUT, 0, 2)
    transport = LoopbackTransport(memory, "prefill-0")
    session = SourceSession(cut, HandoffAccepted((Offer("loopback", b"x"),), LAYOUT, "h"), 30.0, 1 << 30)
    driver = SourceDriver(session, memory, {"loopback": transport}, RECEIVER, "t", 1, time.monotonic, takes_batches)
    said: asyncio.Queue[HandoffDown] = asyncio.Queue()

    async def incoming() -> AsyncIterator[pb.HandoffDown]:
        sealer = Sealer()
        while True:
            yield sealer.seal(down_to_pb("t", RECEIVER.generation, await said.get()))

    prompt = Prompt(cut, driver.post)
    running = asyncio.create_task(driver.run(incoming(), prompt))
    writes: list[list[HandoffUp]] = []
    outgoing = driver.outgoing()
    try:
        async with asyncio.timeout(30):
            async for envelope in outgoing:
                writes.append([up_from_pb(part) for part in (envelope, *envelope.then)])
                if isinstance(writes[-1][0], HandoffAccepted):
                    driver.post(UseTransport("loopback"))
                    prompt.compute()
                if any(isinstance(message, PrefillDone) for message in writes[-1]):
                    break
    finally:
        await outgoing.aclose()
        said.put_nowait(CancelHandoff("enough"))
        await running
        await transport.close()
    return writes


async def test_the_last_pieces_and_the_first_token_take_one_write() -> None:
    accepted, end = await writes_of_a_prompt(takes_batches=True)
    assert [type(message) for message in accepted] == [HandoffAccepted]
    assert [type(message) for message in end] == [KvPieces, PrefillDone]
    assert len(end) <= 1 + MAX_BATCH


async def test_a_receiver_of_an_earlier_release_hears_them_one_by_one() -> None:
    writes = await writes_of_a_prompt(takes_batches=False)
    assert [[type(message) for message in write] for write in writes] == [[HandoffAccepted], [KvPieces], [PrefillDone]]


def test_what_goes_in_one_write_is_the_last_field_so_that_a_seal_of_an_earlier_release_holds() -> None:
    numbers = {field.name: field.number for field in pb.HandoffUp.DESCRIPTOR.fields}
    assert numbers["then"] == max(numbers.values())
