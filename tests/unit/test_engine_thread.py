"""What waits for an engine thread: new sequences up to a bound, what concerns those that there are always."""

from __future__ import annotations

import asyncio

from builders import fake_runner, make_engine, make_request, run_to_end, tokens_of

from workers.engine.messages import AddMigrant, AddSequence, CancelSequence
from workers.engine.thread import MAX_COMMANDS, MAX_NEW_TOKENS, EngineThread
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


async def test_between_two_steps_no_more_prompts_are_taken_than_a_bite_and_all_in_their_order() -> None:
    """Each is looked through and hashed, and somebody decodes meanwhile."""
    engine = make_engine(fake_runner(1000), max_model_len=10_000, max_batch_tokens=8192)
    thread = EngineThread(engine, asyncio.get_running_loop(), lambda report: None)
    num_tokens = 5000
    for number in range(10):
        request = make_request([5 + (number + at) % 900 for at in range(num_tokens)], 2)
        assert thread.post(AddSequence(number, request, Kind.LOCAL))
        thread.post(CancelSequence(number - 1))
    taken = []
    while engine.sequence(9) is None and len(taken) < 20:
        before = dict(engine.counters())["prefill_tokens"], len(taken)
        assert thread._take_commands(wait=False)
        taken.append({number for number in range(10) if engine.sequence(number) is not None})
        assert before == (dict(engine.counters())["prefill_tokens"], len(taken) - 1), "no step of its own"
    bite = -(-MAX_NEW_TOKENS // num_tokens)
    assert len(taken) == -(-10 // bite) and all(len(each) <= 2 for each in taken), "what is cancelled is not there"
    assert thread._take_commands(wait=False)
    assert len(tokens_of(run_to_end(engine), 9)) == 2


async def test_a_thread_that_is_told_to_stop_looks_at_nothing_more_that_waits() -> None:
    engine = make_engine(fake_runner(1000), max_model_len=10_000, max_batch_tokens=8192, max_queue=4096)
    thread = EngineThread(engine, asyncio.get_running_loop(), lambda report: None)
    request = make_request([5 + at % 900 for at in range(5000)], 2)
    for number in range(400):
        thread.post(AddSequence(number, request, Kind.LOCAL))
    thread.start()
    await thread.stop()
    assert engine.sequence(399) is None
