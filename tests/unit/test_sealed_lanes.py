"""KV on the wire: who is let in, and that bytes which somebody on the way has touched land nowhere as if they were whole."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_ends import HOST, LAYOUT, whole_blocks

from workers.errors import TransferFailed
from workers.kv_memory.memory import KvMemory
from workers.status import WorkerAddress
from workers.transports.contract import IncomingPiece, OutgoingPiece, View
from workers.transports.push import Frame, Inboxes, pack, transfer_key
from workers.transports.sealed_lanes import SealedLane
from workers.transports.sealing import SEGMENT_BYTES, TAG_BYTES, Seal
from workers.transports.tcp import TcpChannel, TcpTransport
from workers.transports.tcp_lanes import IncomingLane

EXAMPLES = int(os.environ.get("BATON_FUZZ_EXAMPLES", "60"))
"""More for a longer run by hand."""
KEY = bytes(16)


@pytest.mark.parametrize(
    "num_bytes", [0, 1, SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1, 3 * SEGMENT_BYTES + 7]
)
def test_what_is_sealed_opens_once_and_in_its_order(num_bytes: int) -> None:
    closing, opening = Seal(KEY), Seal(KEY)
    data = memoryview(os.urandom(num_bytes))
    sealed = memoryview(bytearray(num_bytes + TAG_BYTES))
    closing.close(data, sealed)
    assert num_bytes < 32 or data.tobytes() not in sealed.tobytes()
    found = memoryview(bytearray(num_bytes))
    opening.open(sealed, found)
    assert found == data
    with pytest.raises(TransferFailed):
        opening.open(sealed, found)  # again: another number


@given(at=st.integers(0, 10**9), flip=st.integers(1, 255), order=st.permutations(range(3)))
@settings(max_examples=EXAMPLES)
def test_a_touched_segment_does_not_open(at: int, flip: int, order: list[int]) -> None:
    closing, opening = Seal(KEY), Seal(KEY)
    sealed = []
    for number in range(3):
        buffer = bytearray(100 + TAG_BYTES)
        closing.close(memoryview(bytes([number]) * 100), memoryview(buffer))
        sealed.append(buffer)
    home = memoryview(bytearray(100))
    if order == [0, 1, 2]:
        sealed[0][at % len(sealed[0])] ^= flip
        order = [0]
    with pytest.raises(TransferFailed):
        for number in order:
            opening.open(memoryview(sealed[number]), home)


class Reading:
    """A lane that reads what a test writes to it; its inbox has homes for pieces of a block's size."""

    def __init__(self, make: Callable[[socket.socket, Inboxes], IncomingLane]) -> None:
        self.writer, reader = socket.socketpair()
        self.pool = np.zeros((4, 4096), np.uint8)
        self.ended = threading.Event()
        self.inboxes = Inboxes(self.ended.set, 5.0)
        self.inbox = self.inboxes.open("t", self._place)
        self.lane = make(reader, self.inboxes)
        self.lane.start()

    def _place(self, piece: int) -> View:
        if not 0 <= piece < len(self.pool):
            raise IndexError(piece)
        return self.pool[piece]

    def feed(self, data: bytes) -> None:
        """Writes it and hangs up; returns when the lane has ended."""
        writing = threading.Thread(target=self._write, args=(data,))
        writing.start()
        writing.join()
        self.lane.join()

    def _write(self, data: bytes) -> None:
        with self.writer:
            try:
                self.writer.sendall(data)
            except OSError:
                return


@given(
    header=st.one_of(
        st.binary(max_size=80),
        st.builds(
            lambda piece, offset, length, total: pack(Frame(transfer_key("t"), piece, offset, length, total)),
            *[st.integers(0, 2**32 - 1)] * 4,
        ),
    ),
    rest=st.binary(max_size=6000),
    is_sealed=st.booleans(),
)
@settings(max_examples=EXAMPLES)
def test_a_lane_ends_whatever_comes_in(header: bytes, rest: bytes, is_sealed: bool) -> None:
    make = (lambda c, i: SealedLane(c, i, Seal(KEY))) if is_sealed else IncomingLane
    reading = Reading(make)
    reading.feed(header + rest)
    assert reading.ended.is_set()
    assert not (is_sealed and reading.pool.any())


@asynccontextmanager
async def ends(seals: bool = True) -> AsyncIterator[tuple[TcpTransport, TcpTransport, KvMemory]]:
    memory = KvMemory(LAYOUT)
    memory.bytes[:] = np.random.default_rng(5).integers(0, 256, memory.bytes.size, np.uint8)
    source, target = TcpTransport("127.0.0.1", 5.0, seals=seals), TcpTransport("127.0.0.1", 5.0, seals=seals)
    try:
        yield source, target, memory
    finally:
        await target.close()
        await source.close()
        memory.close()


SOURCE, TARGET = WorkerAddress("prefill-0", 1, "127.0.0.1:1"), WorkerAddress("decode-0", 1, "127.0.0.1:2")


async def fetch(source: TcpTransport, channel: TcpChannel, memory: KvMemory) -> np.ndarray:
    """Two blocks, as they came."""
    pieces = whole_blocks([3, 5])
    found = np.zeros((2, LAYOUT.block_bytes), np.uint8)
    inbox = channel.inbox("t", lambda piece: found[piece])
    outgoing = [
        OutgoingPiece(p.piece, p.source_block, 0, LAYOUT.num_layers, memory.block(p.source_block, 0, LAYOUT.num_layers))
        for p in pieces
    ]
    (arrived, _), _ = await asyncio.gather(_collect(inbox, pieces), source.send(TARGET, "t", outgoing))
    await inbox.close()
    assert set(arrived) == {0, 1}
    return found


async def _collect(inbox: object, pieces: list[IncomingPiece]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return await inbox.collect(pieces)  # type: ignore[attr-defined,no-any-return]


async def relay(port: int, heard: bytearray, touch: Callable[[bytes, int], bytes]) -> asyncio.Server:
    """Somebody on the way to the sender: keeps what it says, and changes it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, is_down: bool) -> None:
            try:
                while data := await source.read(1 << 16):
                    if is_down:
                        data = touch(data, len(heard))
                        heard.extend(data)
                    target.write(data)
                    await target.drain()
            except OSError:
                pass
            finally:
                target.close()

        await asyncio.gather(pump(reader, up_writer, False), pump(up_reader, writer, True))

    return await asyncio.start_server(serve, "127.0.0.1", 0)


def through(offer: bytes, server: asyncio.Server) -> bytes:
    """The offer, with the relay's port in place of the sender's."""
    return json.dumps(json.loads(offer) | {"port": server.sockets[0].getsockname()[1]}).encode()


async def test_who_listens_on_the_way_reads_nothing() -> None:
    async with ends() as (source, target, memory):
        offer = source.offer(TARGET, HOST)
        assert offer is not None
        heard = bytearray()
        async with await relay(json.loads(offer)["port"], heard, lambda data, _: data) as server:
            channel = await target.connect(SOURCE, LAYOUT, through(offer, server))
            found = await fetch(source, channel, memory)
            assert np.array_equal(found[0], memory.block(3, 0, LAYOUT.num_layers))
            assert len(heard) > 2 * LAYOUT.block_bytes
            assert bytes(memory.block(3, 0, 1)[:64]) not in heard
            await target.close()


async def test_who_changes_a_byte_on_the_way_ends_the_lane_and_the_piece_is_lost() -> None:
    def touch(data: bytes, before: int) -> bytes:
        at = 100_000 - before
        return data if not 0 <= at < len(data) else data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    async with ends() as (source, target, memory):
        offer = source.offer(TARGET, HOST)
        assert offer is not None
        async with await relay(json.loads(offer)["port"], bytearray(), touch) as server:
            channel = await target.connect(SOURCE, LAYOUT, through(offer, server))
            inbox = channel.inbox("t", lambda piece: np.zeros(LAYOUT.block_bytes, np.uint8))
            pieces = whole_blocks([3])
            view = memory.block(3, 0, LAYOUT.num_layers)
            sending = asyncio.ensure_future(source.send(TARGET, "t", [OutgoingPiece(0, 3, 0, LAYOUT.num_layers, view)]))
            assert await inbox.collect(pieces) == ((), (0,))
            assert channel.is_broken
            await asyncio.gather(sending, return_exceptions=True)
            await inbox.close()
            await target.close()


async def test_a_call_that_was_recorded_or_made_up_takes_nobodys_place() -> None:
    async with ends() as (source, target, memory):
        offer = source.offer(TARGET, HOST)
        assert offer is not None
        fields = json.loads(offer)
        channel = await target.connect(SOURCE, LAYOUT, offer)
        # Who knows all of the offer but the secret, and answers the challenge with what worked once, or with noise.
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", fields["port"])
            await reader.readexactly(16)
            writer.write(b"BTN3" + bytes.fromhex(fields["token"]) + os.urandom(16) + bytes([0, 1]) + os.urandom(16))
            assert await reader.read() == b""  # shown the door, without a word
            writer.close()
        with pytest.raises(TransferFailed):
            wrong = json.dumps(fields | {"secret": "00" * 32}).encode()
            await target.connect(SOURCE, LAYOUT, wrong)
        found = await fetch(source, channel, memory)
        assert np.array_equal(found[1], memory.block(5, 0, LAYOUT.num_layers))


async def test_a_receiver_that_wants_it_sealed_does_not_take_it_open() -> None:
    async with ends(seals=False) as (source, _, _):
        target = TcpTransport("127.0.0.1", 5.0, seals=True)
        offer = source.offer(TARGET, HOST)
        assert offer is not None
        with pytest.raises(TransferFailed, match="kv_encryption"):
            await target.connect(SOURCE, LAYOUT, offer)
        await target.close()
