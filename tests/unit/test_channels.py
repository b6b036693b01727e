"""A receiver's channels: whom a slow dial holds up, what is remembered of a failed one, and which channels go when there are too many."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from workers.errors import TransferFailed
from workers.kv_memory.memory import KvLayout
from workers.status import WorkerAddress
from workers.transports.channels import Channels
from workers.transports.offers import encode
from workers.transports.tcp import TcpTransport

LAYOUT = KvLayout(4, 1, 1, 64, 16, "float32", 4)


class Link:
    """A channel that carries nothing."""

    def __init__(self, source: WorkerAddress, offer: bytes) -> None:
        self.source, self.offer = source, offer
        self.is_broken = self.is_closed = False
        self.is_idle = True

    async def close(self) -> None:
        self.is_closed = True


def sender(number: int) -> WorkerAddress:
    return WorkerAddress(f"prefill-{number}", 1, f"127.0.0.1:{number + 1}")


class Dialer:
    """Dials for one Channels; counts, and waits where it is told to."""

    def __init__(self, max_channels: int = 8) -> None:
        self.channels: Channels[Link] = Channels(max_channels)
        self.num_dials = 0
        self.gate: asyncio.Event | None = None
        self.began = asyncio.Event()

    async def get(self, number: int, offer: bytes = b"offer", fails: str = "") -> Link:
        async def make() -> Link:
            self.num_dials += 1
            self.began.set()
            if self.gate is not None:
                await self.gate.wait()
            if fails:
                raise TransferFailed(fails)
            return Link(sender(number), offer)

        return await self.channels.get(sender(number), offer, make)


async def test_a_dial_that_hangs_holds_up_nobody_else() -> None:
    dialer = Dialer()
    known = await dialer.get(0)
    dialer.gate = asyncio.Event()
    dialer.began.clear()
    hanging = asyncio.create_task(dialer.get(1))
    await dialer.began.wait()
    async with asyncio.timeout(10):
        assert await dialer.get(0) is known
        dialer.gate, gate = None, dialer.gate
        await dialer.get(2)
    assert not hanging.done()
    gate.set()
    assert (await hanging).source == sender(1)


async def test_those_who_want_the_same_channel_share_one_dial() -> None:
    dialer = Dialer()
    dialer.gate = asyncio.Event()
    first, second = (asyncio.create_task(dialer.get(0)) for _ in range(2))
    third = asyncio.create_task(dialer.get(0))
    await dialer.began.wait()
    third.cancel()  # who goes away leaves the dial to the others
    dialer.gate.set()
    assert await first is await second and dialer.num_dials == 1


async def test_a_failed_dial_is_not_tried_again_at_once_but_another_offer_is() -> None:
    dialer = Dialer()
    for _ in range(3):
        with pytest.raises(TransferFailed, match="no route"):
            await dialer.get(0, fails="no route")
    assert dialer.num_dials == 1
    assert (await dialer.get(0, b"of its next life")).source == sender(0)
    await dialer.channels.forget("prefill-0")
    assert (await dialer.get(0)).source == sender(0)


async def test_beyond_the_bound_the_idle_channel_unused_for_longest_goes_and_one_in_use_never() -> None:
    dialer = Dialer(max_channels=3)
    links = [await dialer.get(number) for number in range(3)]
    links[0].is_idle = False
    await dialer.get(1)  # now 2 is unused for longest
    links.append(await dialer.get(3))
    assert [link.is_closed for link in links] == [False, False, True, False]
    for link in links:
        link.is_idle = False
    with pytest.raises(TransferFailed, match="in use"):
        await dialer.get(4)
    assert [link.is_closed for link in links] == [False, False, True, False]


async def test_a_new_offer_of_a_sender_replaces_the_idle_channel_only_once_it_works() -> None:
    dialer = Dialer()
    old = await dialer.get(0)
    with pytest.raises(TransferFailed):
        await dialer.get(0, b"forged", fails="another nonce")
    assert not old.is_closed and await dialer.get(0) is old
    await dialer.get(0, b"new")
    assert old.is_closed


async def test_who_waits_for_a_dial_hears_that_the_sender_was_given_up() -> None:
    dialer = Dialer()
    dialer.gate = asyncio.Event()
    waiting = asyncio.create_task(dialer.get(0))
    await dialer.began.wait()
    await dialer.channels.forget("prefill-0")
    with pytest.raises(TransferFailed, match="given up"):
        await waiting


@asynccontextmanager
async def black_hole() -> AsyncIterator[int]:
    """A port whose connections are taken by the kernel and never answered."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        yield listener.getsockname()[1]


async def test_a_black_holed_port_costs_other_handoffs_over_tcp_nothing() -> None:
    source, target = TcpTransport("127.0.0.1", 60.0), TcpTransport("127.0.0.1", 60.0)
    receiver = WorkerAddress("decode-0", 1, "127.0.0.1:1")
    async with black_hole() as port:
        try:
            good = source.offer(receiver, "host")
            assert good is not None
            held = encode({"port": port, "lanes": 1, "token": "00" * 16, "secret": "00" * 32, "sealed": 0})
            hanging = asyncio.create_task(target.connect(sender(1), LAYOUT, held))
            await asyncio.sleep(0)
            channel = await target.connect(sender(0), LAYOUT, good)
            assert await target.connect(sender(0), LAYOUT, good) is channel
            assert not hanging.done()  # it has seconds left
            with pytest.raises(TransferFailed):
                await hanging
            with pytest.raises(TransferFailed, match="not dialled again"):
                await target.connect(sender(1), LAYOUT, held)
        finally:
            await target.close()
            await source.close()
