"""Where a handoff's driver waits, and how a router finds out that a worker does not hear it any more."""

from __future__ import annotations

import asyncio

import pytest

from workers.errors import InvariantViolated
from workers.handoff.mailbox import Mailbox, time_left
from workers.wire.grpc_client import UNHEARD_S, Heard


async def test_an_event_comes_in_order_and_nothing_comes_when_the_time_is_up() -> None:
    box: Mailbox[str] = Mailbox(capacity=2, max_waiting=3)
    box.post("a")
    box.post("b")
    assert [await box.next(0.0), await box.next(-1.0), await box.next(0.0)] == ["a", "b", None]
    waiting = asyncio.ensure_future(box.next())
    await asyncio.sleep(0)
    box.post("c")
    assert await waiting == "c"


async def test_a_bound_that_does_not_hold_fails_the_reader_and_holds_up_no_poster() -> None:
    box: Mailbox[int] = Mailbox(capacity=1, max_waiting=3)
    for number in range(5):
        box.post(number)
    assert len(box) == 3
    with pytest.raises(InvariantViolated, match="more than 3 events"):
        await box.next()
    empty: Mailbox[int] = Mailbox(capacity=1, max_waiting=0)
    waiting = asyncio.ensure_future(empty.next())
    await asyncio.sleep(0)
    empty.post(1)
    with pytest.raises(InvariantViolated):
        await waiting


def test_a_deadline_is_told_by_the_clock_of_whoever_asks() -> None:
    assert time_left(None, 100.0) is None
    assert time_left(103.0, 100.0) == 3.0


def test_a_message_that_a_speaking_worker_has_not_heard_for_too_long_is_lost() -> None:
    heard = Heard()
    assert heard.check(0, sent=1, now=100.0)  # the first frame says nothing yet
    assert heard.check(1, sent=2, now=101.0)
    assert all(heard.check(1, sent=2, now=101.0 + second) for second in range(1, int(UNHEARD_S) + 1))
    assert not heard.check(1, sent=2, now=101.1 + UNHEARD_S) and heard.expected == 2
    assert heard.check(2, sent=3, now=102.0 + UNHEARD_S)  # it was only slow
