"""What waits for an engine thread: new sequences up to a bound, what concerns those that there are always."""

from __future__ import annotations

import asyncio

from builders import make_engine, make_request

from workers.engine.messages import AddMigrant, AddSequence, CancelSequence
from workers.engine.thread import MAX_COMMANDS, EngineThread
from workers.scheduler.sequence import Kind


async def test_new_sequences_are_refused_while_many_commands_wait_and_those_that_concern_others_are_not() -> None:
    thread = EngineThread(
        make_engine(), asyncio.get_running_loop(), lambda report: None
    )  # as in a step that does not end
    request = make_request(range(5, 10), 2)
    for number in range(MAX_COMMANDS // 2):
        assert thread.post(AddSequence(number, request, Kind.LOCAL)) and thread.post(CancelSequence(number))
    assert not thread.post(AddSequence(MAX_COMMANDS, request, Kind.LOCAL)) and not thread.post(
        AddMigrant(MAX_COMMANDS, request)
    )
    assert thread.post(CancelSequence(1))
