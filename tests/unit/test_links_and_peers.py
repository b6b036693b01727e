"""More peers than a worker keeps connections to: which are closed to make room, and that none is while it is in use."""

from __future__ import annotations

from collections import Counter

import pytest
from transport_ends import HOST, LAYOUT, whole_blocks

from workers.engine.messages import BlocksFilled
from workers.errors import TransferFailed
from workers.handoff.protocol.messages import OpenHandoff, PromptSubject
from workers.handoff.transfers import Peers
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.request import Request, SamplingParams
from workers.serving.exports import Exports
from workers.serving.observer import Unobserved
from workers.status import WorkerAddress
from workers.transports.channels import SenderLinks
from workers.transports.contract import OutgoingPiece
from workers.transports.tcp import TcpTransport
from workers.wire import streams as grpc_options


def at(port: int) -> WorkerAddress:
    return WorkerAddress("prefill-0", 1, f"127.0.0.1:{port}")


async def test_a_channel_to_a_sender_is_not_closed_while_a_transfer_uses_it() -> None:
    peers = Peers(max_channels=2)
    first, second = await peers.take(at(1)), await peers.take(at(2))
    peers.give(second)
    third = await peers.take(at(3))  # in the room of the second, though the first was opened before it
    assert await peers.take(at(1)) is first
    with pytest.raises(TransferFailed, match="in use"):
        await peers.take(at(2))
    peers.give(third)
    assert (await peers.take(at(2))) is not second
    await peers.close()


class Quiet:
    """A link that is sending, or not."""

    def __init__(self) -> None:
        self.is_sending = self.is_stopped = False

    def stop(self) -> None:
        self.is_stopped = True


def test_the_link_that_was_quiet_for_longest_makes_room_and_one_that_sends_does_not() -> None:
    links: SenderLinks[Quiet] = SenderLinks(max_links=3, quiet_s=0.0)
    kept = [Quiet() for _ in range(3)]
    for number, link in enumerate(kept):
        assert links.put(("decode", number), link) is None
    assert links.use(("decode", 0)) is kept[0]
    kept[1].is_sending = True
    links.make_room(("decode", 2))  # it has one already
    assert not any(link.is_stopped for link in kept)
    links.make_room(("decode", 3))
    assert [link.is_stopped for link in kept] == [False, False, True]


def test_links_that_were_all_used_a_moment_ago_stay() -> None:
    links: SenderLinks[Quiet] = SenderLinks(max_links=1, quiet_s=3600.0)
    link = Quiet()
    links.put(("decode", 0), link)
    with pytest.raises(TransferFailed, match="in use"):
        links.make_room(("decode", 1))
    assert not link.is_stopped


async def test_one_receiver_more_than_there_is_room_for_is_served_over_tcp() -> None:
    memory = KvMemory(LAYOUT)
    memory.bytes[:] = 7
    source = TcpTransport("127.0.0.1", 20.0, links=SenderLinks(max_links=2, quiet_s=0.0))
    address = WorkerAddress("prefill-0", 1, "127.0.0.1:1")
    targets = [TcpTransport("127.0.0.1", 20.0) for _ in range(3)]
    (piece,) = whole_blocks([1])
    view = memory.block(1, 0, LAYOUT.num_layers)
    try:
        for number, target in enumerate(targets):
            to, home = WorkerAddress(f"decode-{number}", 1, "127.0.0.1:1"), KvMemory(LAYOUT)
            offer = source.offer(to, HOST)
            assert offer is not None
            channel = await target.connect(address, LAYOUT, offer)
            inbox = channel.inbox("t", lambda piece, home=home: home.block(2, 0, LAYOUT.num_layers))  # type: ignore[misc]
            await source.send(to, "t", [OutgoingPiece(piece.piece, 1, 0, LAYOUT.num_layers, view)])
            assert await inbox.collect([piece]) == ((0,), ())
            await inbox.close()
    finally:
        for transport in (*targets, source):
            await transport.close()


def test_no_channel_between_workers_goes_through_a_proxy_of_the_environment() -> None:
    channels = (grpc_options.ROUTER_CHANNEL, grpc_options.HANDOFF_CHANNEL, grpc_options.kv_stream_channel(1 << 20))
    assert all(dict(options)["grpc.enable_http_proxy"] == 0 for options in channels)


def test_a_prompt_of_many_chunks_is_told_of_each_block_once() -> None:
    layout = KvLayout(64, 1, 1, 64, 16, "float32", 4)
    request = Request("r", tuple(range(32 * 64)), SamplingParams(max_tokens=1))
    target = WorkerAddress("decode-0", 1, "127.0.0.1:1")
    opening = OpenHandoff(target, HOST, 1, "f", layout, PromptSubject(request), 0, 32, ("shm",))
    exports = Exports(layout, 1.0, lambda name: None, lambda: 9, Counter(), Unobserved())
    exports.open(1, opening)
    exports.begin(1)
    blocks, told = tuple(range(32)), []
    for num_filled in range(1, 33):
        told += [command.event for command in exports.filled(BlocksFilled(9, blocks, num_filled))]  # type: ignore[union-attr]
    assert [(event.first, event.end) for event in told] == [(n, n + 1) for n in range(32)]
