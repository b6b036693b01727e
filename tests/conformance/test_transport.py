"""What every KV transport promises, run against all that work without a GPU."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transport_ends
from transport_ends import HOST, LAYOUT, TIMEOUT_S, End, whole_blocks

from workers.errors import TransferFailed
from workers.kv_memory.memory import KvLayout
from workers.status import WorkerAddress
from workers.transports.contract import Channel, IncomingPiece, View
from workers.transports.nixl_agent import installed

NAMES = ("loopback", "shm", "tcp", "grpc", "gloo", "nixl")
PULLING = ("loopback", "shm")
"""Their receiver reads the sender's pool itself, so it can read on when the sender is gone."""
READING = (*PULLING, "nixl")
"""Their receiver names what it reads."""
BOUND_S = 3 * TIMEOUT_S
BIG = KvLayout(96, 8, 2, 64, 128, "float32", 4)
"""A block of 1 MiB, a pool of 96 MiB: what takes a while."""

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "nixl" and installed() is None:
        pytest.skip("NIXL is not installed: pip install 'baton-serve[nixl]'")
    return str(request.param)


@pytest.fixture
async def ends(name: str) -> AsyncIterator[tuple[End, End]]:
    """A sender full of noise and a receiver full of zeros."""
    source, target = await End.start(name, "prefill-0"), await End.start(name, "decode-0")
    source.fill(1)
    yield source, target
    await target.stop()
    await source.stop()


async def connect(source: End, target: End) -> Channel:
    offer = source.transport.offer(target.address, HOST)
    assert offer is not None
    return await asyncio.wait_for(target.transport.connect(source.address, source.memory.layout, offer), BOUND_S)


async def transfer(
    source: End, target: End, channel: Channel, transfer_id: str, blocks: Sequence[int], homes: Sequence[int]
) -> None:
    """Moves whole blocks and checks that every byte is where it belongs."""
    pieces = whole_blocks(blocks, source.memory.layout)
    inbox = channel.inbox(transfer_id, target.placer(pieces, homes))
    (arrived, lost), _ = await asyncio.wait_for(
        asyncio.gather(
            inbox.collect(pieces), source.transport.send(target.address, transfer_id, source.outgoing(pieces))
        ),
        BOUND_S,
    )
    assert (sorted(arrived), lost) == ([p.piece for p in pieces], ())
    await inbox.close()
    assert_equal(source, target, blocks, homes)


def assert_equal(source: End, target: End, blocks: Sequence[int], homes: Sequence[int]) -> None:
    num_layers = source.memory.layout.num_layers
    for block, home in zip(blocks, homes, strict=True):
        assert np.array_equal(source.memory.block(block, 0, num_layers), target.memory.block(home, 0, num_layers))


async def test_bytes_arrive_where_they_belong_and_nowhere_else(ends: tuple[End, End]) -> None:
    source, target = ends
    channel = await connect(source, target)
    pieces = [IncomingPiece(4, 3, 0, 1), IncomingPiece(0, 3, 1, 3), IncomingPiece(9, 15, 2, 2)]
    inbox = channel.inbox("t", target.placer(pieces, [5, 5, 0]))
    sending = asyncio.create_task(source.transport.send(target.address, "t", source.outgoing(pieces)))
    arrived, lost = await asyncio.wait_for(inbox.collect(pieces), BOUND_S)
    await sending
    assert (set(arrived), lost) == ({0, 4, 9}, ())
    expected = np.zeros_like(target.memory.bytes)
    layer = LAYOUT.layer_bytes
    expected[5 * LAYOUT.block_bytes :][: LAYOUT.block_bytes] = source.memory.block(3, 0, 4)
    expected[2 * layer : 4 * layer] = source.memory.block(15, 2, 2)
    assert np.array_equal(target.memory.bytes, expected)
    await inbox.close()


async def test_a_piece_beside_one_that_nobody_wants_is_in_place_or_lost(ends: tuple[End, End]) -> None:
    source, target = ends
    channel = await connect(source, target)
    unwanted, wanted, after = IncomingPiece(7, 3, 0, 1), IncomingPiece(8, 3, 1, 2), IncomingPiece(9, 4, 0, 4)
    inbox = channel.inbox("t", target.placer([wanted, after], [5, 6]))
    sending = asyncio.create_task(
        source.transport.send(target.address, "t", source.outgoing([unwanted, wanted, after]))
    )
    arrived, lost = await asyncio.wait_for(inbox.collect([wanted, after]), BOUND_S)
    await sending
    assert set(arrived) | set(lost) == {8, 9} and 9 in arrived
    expected = np.zeros_like(target.memory.bytes).reshape(LAYOUT.num_blocks, LAYOUT.num_layers, -1)
    expected[6].reshape(-1)[:] = source.memory.block(4, 0, 4)
    if 8 in arrived:
        expected[5, 1:3].reshape(-1)[:] = source.memory.block(3, 1, 2)
    assert np.array_equal(target.memory.bytes, expected.reshape(-1))
    await inbox.close()


async def test_a_checksum_made_on_the_way_is_that_of_the_bytes(ends: tuple[End, End]) -> None:
    import xxhash

    source, target = ends
    channel = await connect(source, target)
    pieces = whole_blocks([2, 4])
    inbox = channel.inbox("t", target.placer(pieces, [1, 2]))
    await asyncio.gather(source.transport.send(target.address, "t", source.outgoing(pieces)), inbox.collect(pieces))
    for piece, home in ((0, 1), (1, 2)):
        assert inbox.checksum(piece) in (None, xxhash.xxh3_64_intdigest(target.memory.block(home, 0, 4)))
    assert inbox.checksum(17) is None
    await inbox.close()


async def test_transfers_interleave_on_one_channel(ends: tuple[End, End]) -> None:
    source, target = ends
    channel = await connect(source, target)
    await asyncio.gather(
        *(transfer(source, target, channel, f"t{n}", [n, 15 - n], [15 - n, n]) for n in range(8)),
    )


async def test_transfers_share_a_channel_and_both_directions_work(ends: tuple[End, End]) -> None:
    source, target = ends
    assert await connect(source, target) is await connect(source, target)
    await transfer(source, target, await connect(source, target), "there", [1, 2], [1, 2])
    await transfer(target, source, await connect(target, source), "back", [1, 2], [8, 9])
    assert_equal(source, source, [1, 2], [8, 9])


async def test_pieces_may_come_before_anybody_collects_them(ends: tuple[End, End]) -> None:
    source, target = ends
    channel = await connect(source, target)
    pieces = whole_blocks([1, 2, 3])
    inbox = channel.inbox("early", target.placer(pieces, [4, 5, 6]))
    await asyncio.wait_for(source.transport.send(target.address, "early", source.outgoing(pieces)), BOUND_S)
    await transfer(source, target, channel, "another", [7], [7])
    arrived, lost = await asyncio.wait_for(inbox.collect(pieces[1:]), BOUND_S)
    assert (sorted(arrived), lost) == ([1, 2], ())
    assert await asyncio.wait_for(inbox.collect(pieces[:1]), BOUND_S) == ((0,), ())
    assert_equal(source, target, [1, 2, 3], [4, 5, 6])
    await inbox.close()


async def test_a_piece_can_be_sent_and_collected_again(ends: tuple[End, End]) -> None:
    source, target = ends
    channel = await connect(source, target)
    pieces = whole_blocks([1])
    inbox = channel.inbox("t", target.placer(pieces, [4]))
    for _ in range(2):
        target.memory.bytes[:] = 0
        await asyncio.gather(source.transport.send(target.address, "t", source.outgoing(pieces)), inbox.collect(pieces))
        assert_equal(source, target, [1], [4])
    await inbox.close()


async def test_nothing_is_written_after_an_inbox_has_closed(name: str) -> None:
    source, target = await End.start(name, "prefill-0", layout=BIG), await End.start(name, "decode-0", layout=BIG)
    source.fill(1)
    channel = await connect(source, target)
    pieces = whole_blocks(range(80), BIG)
    began = asyncio.Event()
    loop = asyncio.get_running_loop()
    home = target.placer(pieces, range(80))

    def place(piece: int) -> View:
        loop.call_soon_threadsafe(began.set)
        return home(piece)

    inbox = channel.inbox("t", place)
    sending = asyncio.create_task(source.transport.send(target.address, "t", source.outgoing(pieces)))
    collecting = asyncio.create_task(inbox.collect(pieces))
    await asyncio.wait_for(began.wait(), BOUND_S)
    await asyncio.wait_for(inbox.close(), BOUND_S)
    before = target.memory.bytes.copy()
    arrived, lost = await asyncio.wait_for(collecting, BOUND_S)
    assert sorted(arrived + lost) == list(range(80))
    await asyncio.wait_for(sending, BOUND_S)
    await transfer(source, target, channel, "next", range(80, 96), range(80, 96))
    assert np.array_equal(target.memory.bytes[: 80 * BIG.block_bytes], before[: 80 * BIG.block_bytes])
    for piece in arrived:
        assert np.array_equal(target.memory.block(piece, 0, 8), source.memory.block(piece, 0, 8))
    await target.stop()
    await source.stop()


async def test_pieces_that_do_not_exist_are_lost_and_harm_nobody(ends: tuple[End, End], name: str) -> None:
    source, target = ends
    channel = await connect(source, target)
    pieces = whole_blocks([1, 2])
    known = target.placer(pieces[:1], [4])
    inbox = channel.inbox("t", known)
    collecting = asyncio.create_task(inbox.collect([pieces[0]]))
    await asyncio.wait_for(source.transport.send(target.address, "t", source.outgoing(pieces)), BOUND_S)
    assert await asyncio.wait_for(collecting, BOUND_S) == ((0,), ())
    if name in READING:
        assert await inbox.collect([IncomingPiece(0, 16, 0, 4)]) == ((), (0,))
        assert await inbox.collect([IncomingPiece(0, 1, 0, 1)]) == ((), (0,))
    assert await asyncio.wait_for(inbox.collect([pieces[1]]), BOUND_S) == ((), (1,))
    await transfer(source, target, channel, "next", [3], [3])
    await inbox.close()


async def test_closing_a_channel_loses_what_has_not_arrived(ends: tuple[End, End]) -> None:
    source, target = ends
    channel = await connect(source, target)
    pieces = whole_blocks([1, 2])
    inbox = channel.inbox("t", target.placer(pieces, [1, 2]))
    await channel.close()
    assert await asyncio.wait_for(inbox.collect(pieces), BOUND_S) == ((), (0, 1))
    await inbox.close()


async def test_a_closed_sender_takes_its_pieces_with_it(ends: tuple[End, End], name: str) -> None:
    source, target = ends
    channel = await connect(source, target)
    await transfer(source, target, channel, "first", [1], [1])
    pieces = whole_blocks([1, 2])
    inbox = channel.inbox("t", target.placer(pieces, [1, 2]))
    await source.transport.close()
    await source.transport.close()
    arrived, lost = await asyncio.wait_for(inbox.collect(pieces), BOUND_S)
    # A mapping outlives its owner; the session hears of the loss from its control stream.
    if name == "nixl":  # as may UCX's, in one process
        assert sorted(arrived + lost) == [0, 1]
    else:
        assert (arrived, lost) == (((0, 1), ()) if name == "shm" else ((), (0, 1)))
    await inbox.close()


@pytest.mark.parametrize("offer", [b"", b"{}", b"\xff\xfe", b"[1]", b'{"pid":"x"}', b"[" * 4000, b" " * 9000])
async def test_an_offer_that_is_none_is_refused(ends: tuple[End, End], offer: bytes) -> None:
    source, target = ends
    with pytest.raises(TransferFailed):
        await target.transport.connect(source.address, LAYOUT, offer)


async def test_a_wrong_token_is_refused(ends: tuple[End, End]) -> None:
    source, target = ends
    offer = source.transport.offer(target.address, HOST)
    assert offer is not None
    fields: dict[str, Any] = json.loads(offer)
    secret = next(key for key in ("token", "nonce") if key in fields)
    turned = "".join("0123456789abcdef"[15 - int(digit, 16)] for digit in fields[secret])
    with pytest.raises(TransferFailed):
        await target.transport.connect(source.address, LAYOUT, json.dumps(fields | {secret: turned}).encode())
    await transfer(source, target, await connect(source, target), "after", [1], [1])


async def test_what_needs_one_host_is_not_offered_to_another(ends: tuple[End, End], name: str) -> None:
    source, _ = ends
    elsewhere = WorkerAddress("decode-9", 1, "192.0.2.1:1")
    assert (source.transport.offer(elsewhere, "another-host") is None) is (name in PULLING)


async def test_workers_that_restart_with_a_higher_generation_find_each_other_again(name: str) -> None:
    source, target = await End.start(name, "prefill-0"), await End.start(name, "decode-0")
    source.fill(1)
    await transfer(source, target, await connect(source, target), "a", [1], [1])
    await target.stop()
    await source.transport.forget("decode-0")
    target = await End.start(name, "decode-0", generation=2)
    await transfer(source, target, await connect(source, target), "b", [2], [2])
    await source.stop()
    await target.transport.forget("prefill-0")
    source = await End.start(name, "prefill-0", generation=2)
    source.fill(2)
    await transfer(source, target, await connect(source, target), "c", [3], [3])
    await target.stop()
    await source.stop()


class Child:
    """A sender in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, name: str) -> Child:
        root = Path(__file__).resolve().parents[2]
        process = await asyncio.create_subprocess_exec(
            sys.executable, transport_ends.__file__, name,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip
        return cls(process)

    async def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        reply: dict[str, Any] = json.loads(await asyncio.wait_for(self.process.stdout.readline(), BOUND_S))
        return reply

    async def ask(self, do: str, to: WorkerAddress, **fields: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        line = {"do": do, "to": [to.worker_id, to.generation, to.target], **fields}
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        return await self.answer()


async def test_a_killed_sender_loses_its_pieces_within_the_bound(name: str) -> None:
    if name == "loopback":
        pytest.skip("a loopback sender dies with its receiver")
    child = await Child.start(name)
    target = await End.start(name, "decode-0")
    try:
        source = WorkerAddress("prefill-0", 1, (await child.answer())["target"])
        offer = base64.b64decode((await child.ask("offer", target.address))["offer"])
        channel = await target.transport.connect(source, LAYOUT, offer)
        pieces = whole_blocks([1, 2, 3, 4])
        inbox = channel.inbox("t", target.placer(pieces, [1, 2, 3, 4]))
        collecting = asyncio.create_task(inbox.collect(pieces[:2]))
        await child.ask("send", target.address, transfer="t", blocks=[1, 2])
        assert await asyncio.wait_for(collecting, BOUND_S) == ((0, 1), ())
        collecting = asyncio.create_task(inbox.collect(pieces))
        await asyncio.sleep(0)
        child.process.send_signal(signal.SIGKILL)
        await child.process.wait()
        arrived, lost = await asyncio.wait_for(collecting, BOUND_S)
        if name == "nixl":  # reads by itself as well, but not out of the memory of the dead
            assert sorted(arrived + lost) == [0, 1, 2, 3]
        else:
            assert (arrived, lost) == (((0, 1, 2, 3), ()) if name in PULLING else ((), (0, 1, 2, 3)))
        await inbox.close()
        # One that comes back under the same name is another sender.
        again = await Child.start(name)
        try:
            source = WorkerAddress("prefill-0", 2, (await again.answer())["target"])
            await target.transport.forget("prefill-0")
            offer = base64.b64decode((await again.ask("offer", target.address))["offer"])
            channel = await target.transport.connect(source, LAYOUT, offer)
            inbox = channel.inbox("t", target.placer(pieces, [5, 6, 7, 8]))
            collecting = asyncio.create_task(inbox.collect(pieces))
            await again.ask("send", target.address, transfer="t", blocks=[1, 2, 3, 4])
            assert await asyncio.wait_for(collecting, BOUND_S) == ((0, 1, 2, 3), ())
            assert_equal(target, target, [1, 2], [5, 6])
            await inbox.close()
        finally:
            again.process.kill()
            await again.process.wait()
    finally:
        await target.stop()
        if child.process.returncode is None:
            child.process.kill()
            await child.process.wait()


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


async def test_a_receiver_that_does_not_collect_costs_no_memory(name: str) -> None:
    source, target = await End.start(name, "prefill-0", layout=BIG), await End.start(name, "decode-0", layout=BIG)
    source.fill(1)
    target.memory.bytes[:] = 0
    channel = await connect(source, target)
    await transfer(source, target, channel, "first", [0, 1], [0, 1])
    pieces = whole_blocks(range(96), BIG)
    before = anonymous_bytes()
    inbox = channel.inbox("registered", target.placer(pieces, range(96)))
    for transfer_id in ("registered", "unknown"):
        await asyncio.wait_for(source.transport.send(target.address, transfer_id, source.outgoing(pieces)), BOUND_S)
    assert anonymous_bytes() - before < 48 << 20  # a fraction of the 192 MiB that were sent
    arrived, _ = await asyncio.wait_for(inbox.collect(pieces), BOUND_S)
    assert len(arrived) == 96
    await inbox.close()
    await target.stop()
    await source.stop()


async def test_closing_leaves_no_descriptor_thread_or_socket(name: str) -> None:
    async def once() -> None:
        source, target = await End.start(name, "prefill-0"), await End.start(name, "decode-0")
        source.fill(1)
        await transfer(source, target, await connect(source, target), "t", [1, 2, 3], [1, 2, 3])
        await target.stop()
        await target.stop()
        await source.stop()

    def held() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    await once()
    await once()
    before = held()
    for _ in range(8):
        await once()
    deadline = asyncio.get_running_loop().time() + BOUND_S
    # Libraries keep a handle or two for a while; what a round leaves behind would be there eight times.
    while any(now - then >= 8 for now, then in zip(held(), before, strict=True)):
        assert asyncio.get_running_loop().time() < deadline, (before, held())
        await asyncio.sleep(0.05)
