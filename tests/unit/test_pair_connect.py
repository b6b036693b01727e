"""A receiver that stops waiting for a Gloo pair while the pair is being made."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from transport_ends import HOST, LAYOUT, TIMEOUT_S, End, whole_blocks

from workers.transports.collective import GlooTransport
from workers.transports.pair_group import PairGroup

BOUND_S = 3 * TIMEOUT_S


class HeldPairs(GlooTransport):
    """Makes no pair before it is let."""

    def __init__(self, end: End) -> None:
        super().__init__(end.memory, "127.0.0.1", TIMEOUT_S)
        self.asked, self.may_go_on = threading.Event(), threading.Event()

    def make_pair(self, store: Any, session: bytes, rank: int) -> PairGroup:
        self.asked.set()
        assert self.may_go_on.wait(BOUND_S)
        return super().make_pair(store, session, rank)


def receiving() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "kv-receive"}


@pytest.mark.timeout(240)
async def test_a_connect_that_is_cancelled_while_its_pair_is_made_breaks_no_thread_and_no_later_connect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", broken.append)
    before = receiving()
    source, target = await End.start("gloo", "prefill-0"), await End.start("gloo", "decode-0")
    target.transport = held = HeldPairs(target)
    source.fill(1)
    offer = source.transport.offer(target.address, HOST)
    assert offer is not None and isinstance(source.transport, GlooTransport)
    connecting = asyncio.create_task(held.connect(source.address, LAYOUT, offer))
    assert await asyncio.to_thread(held.asked.wait, BOUND_S)
    assert source.transport._links
    connecting.cancel()
    async with asyncio.timeout(BOUND_S):
        while source.transport._links:  # until the sender has seen the receiver close its connection
            await asyncio.sleep(0.01)
    held.may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(connecting, BOUND_S)
    assert not broken and receiving() == before

    offer = source.transport.offer(target.address, HOST)
    assert offer is not None
    channel = await asyncio.wait_for(held.connect(source.address, LAYOUT, offer), BOUND_S)
    pieces = whole_blocks([1, 2])
    inbox = channel.inbox("t", target.placer(pieces, [3, 4]))
    sending = asyncio.create_task(source.transport.send(target.address, "t", source.outgoing(pieces)))
    assert await asyncio.wait_for(inbox.collect(pieces), BOUND_S) == ((0, 1), ())
    await sending
    assert target.memory.block(3, 0, 4).tobytes() == source.memory.block(1, 0, 4).tobytes()
    await inbox.close()
    await target.stop()
    await source.stop()
