"""Stories of a worker that keeps requests for routers that have not sent them: found by their job, heard along, told again, ended."""

from __future__ import annotations

from typing import Any

import pytest
from builders import make_request
from worker_story import ASKER, PEER, WorkerStory, permitted

from workers.engine.messages import CancelSequence, TransferWanted
from workers.errors import Refusal
from workers.handoff.protocol.messages import Handoff, SequenceMoved
from workers.request import FinishReason, Output
from workers.serving import events
from workers.serving.waiting_jobs import MAX_JOBS, MAX_TICKET_BYTES, WaitingJobs
from workers.status import Role
from workers.token_logprobs import TokenLogprob
from workers.wire.attach import Adopt, Cancel, Find, Found, Kept, Migration, Waits


def found(story: WorkerStory, session: int, job: str = "j", ends: bool = False) -> Found:
    story.tell(events.RouterSaid(session, Find(7, job, ends)))
    frames = [frame for frame in story.frames[session] if frame.found]
    (only,) = frames[-1].found
    assert only.number == 7
    return only


def join(story: WorkerStory, session: int, attempt: str = "r~2#1") -> None:
    story.tell(events.RouterSaid(session, Adopt("r", attempt, 0, joins=True)))


def begun(**fields: Any) -> tuple[WorkerStory, int]:
    """Two routers; the first has sent a request that has said a token."""
    settings = {
        name: fields.pop(name)
        for name in [*fields]
        if name in ("answers_kept_s", "max_kept_answer_bytes", "max_kept_tokens")
    }
    story = WorkerStory(Role.MIXED, **settings)
    story.attach(1)
    story.attach(2)
    kept = Kept("j", 1, b"ticket", bool(fields.pop("background", False)), fields.pop("owner", 0))
    left_s = fields.pop("remaining_s", 0.0)
    request = make_request(range(5, 105), 50, request_id="r#1", **fields)
    number = story.submit(1, request, name="r", kept=kept, remaining_s=left_s)
    story.say(number, "r#1", 0, 7)
    return story, number


def test_a_request_is_found_by_its_job_while_it_runs_and_when_it_has_ended() -> None:
    story, number = begun()
    (running,) = found(story, 2).requests
    assert (running.name, running.num_prompt_tokens, running.num_tokens, running.finish_reason) == ("r", 100, 1, None)
    assert found(story, 2).ticket == b"ticket" and found(story, 2, "other").requests == ()
    story.say(number, "r#1", 1, 8, ends=FinishReason.STOP)
    (ended,) = found(story, 2).requests
    assert (ended.num_tokens, ended.finish_reason, ended.is_whole) == (2, FinishReason.STOP, True)
    assert story.core.is_idle
    join(story, 2)
    assert story.tokens(2, "r~2#1") == [7, 8] and story.last(2).finish_reason is FinishReason.STOP
    assert len(found(story, 2).requests) == 1, "it is told again as often as somebody asks"
    join(story, 2, "r~3#1")
    assert story.tokens(2, "r~3#1") == [7, 8]


def test_who_joins_hears_everything_and_the_owner_goes_on_hearing_it() -> None:
    story, number = begun()
    join(story, 2)
    story.say(number, "r#1", 1, 8)
    assert story.tokens(1, "r#1") == story.tokens(2, "r~2#1") == [7, 8]
    story.cancel(2, "r~2#1")
    story.say(number, "r#1", 2, 9)
    assert story.tokens(1, "r#1") == [7, 8, 9] and story.tokens(2, "r~2#1") == [7, 8]


@pytest.mark.parametrize("leaves", ["lost", "cancels"])
def test_when_the_owner_goes_the_request_is_whose_who_hears_along(leaves: str) -> None:
    story, number = begun()
    join(story, 2)
    story.lose(1) if leaves == "lost" else story.cancel(1, "r#1")
    story.say(number, "r#1", 1, 8)
    assert story.tokens(2, "r~2#1") == [7, 8] and story.core.counters["requests_orphaned"] == 0
    assert story.core.counters["orphans_given_up"] == 0
    story.cancel(2, "r~2#1")
    assert story.posted[-1] == CancelSequence(number)


def test_what_is_let_go_runs_on_for_its_grace_and_no_longer() -> None:
    story, number = begun()
    story.tell(events.RouterSaid(1, Cancel("r#1", lets_go=True)))
    story.say(number, "r#1", 1, 8)
    join(story, 2)
    story.say(number, "r#1", 2, 9)
    assert story.tokens(1, "r#1") == [7] and story.tokens(2, "r~2#1") == [7, 8, 9]
    story.tell(events.RouterSaid(2, Cancel("r~2#1", lets_go=True)))
    story.after(31.0)
    assert story.posted[-1] == CancelSequence(number) and found(story, 2).requests == ()


def test_work_of_the_background_needs_no_router_and_is_kept_when_it_ends() -> None:
    story, number = begun(background=True)
    story.lose(1)
    story.after(100.0)
    story.say(number, "r#1", 1, 8, ends=FinishReason.LENGTH)
    assert found(story, 2).requests[0].finish_reason is FinishReason.LENGTH
    join(story, 2)
    assert story.tokens(2, "r~2#1") == [7, 8]


def test_an_answer_is_kept_for_a_while_within_a_bound() -> None:
    story, number = begun(answers_kept_s=20.0)
    story.say(number, "r#1", 1, 8, ends=FinishReason.STOP)
    story.after(19.0)
    assert found(story, 2).requests
    story.after(2.0)
    assert found(story, 2).requests == ()
    for setting in ({"answers_kept_s": 0.0}, {"max_kept_answer_bytes": 100}):
        story, number = begun(**setting)
        story.say(number, "r#1", 1, 8, ends=FinishReason.STOP)
        assert found(story, 2).requests == ()


def test_of_too_many_answers_the_oldest_go() -> None:
    story, number = begun(max_kept_answer_bytes=22_000)
    story.say(number, "r#1", 1, 8, ends=FinishReason.STOP)
    for place in range(5):
        name = f"s{place}"
        other = story.submit(
            1, make_request(range(5, 105), 50, request_id=f"{name}#1"), name=name, kept=Kept(f"j{place}")
        )
        story.say(other, f"{name}#1", 0, 8, ends=FinishReason.STOP)
    assert [len(found(story, 2, job).requests) for job in ("j", "j0", "j1", "j2", "j3", "j4")] == [0, 0, 0, 1, 1, 1]


def test_who_keeps_little_is_not_pushed_out_by_who_keeps_much() -> None:
    story, number = begun(max_kept_answer_bytes=22_000, owner=1)
    story.say(number, "r#1", 1, 8, ends=FinishReason.STOP)
    for place in range(9):
        name, kept = f"s{place}", Kept(f"j{place}", owner=2)
        other = story.submit(1, make_request(range(5, 105), 50, request_id=f"{name}#1"), name=name, kept=kept)
        story.say(other, f"{name}#1", 0, 8, ends=FinishReason.STOP)
    assert len(found(story, 2).requests) == 1
    assert [len(found(story, 2, f"j{place}").requests) for place in range(9)] == [0] * 7 + [1] * 2


def test_a_tenant_that_leaves_much_behind_costs_no_other_its_orphans() -> None:
    story = WorkerStory(Role.MIXED, max_orphans=3)
    story.attach(1)
    story.attach(2)
    mine = story.submit(1, "r#1", name="r", kept=Kept("j", owner=1))
    for place in range(5):
        story.submit(1, f"s{place}#1", name=f"s{place}", kept=Kept(f"j{place}", owner=2))
    story.lose(1)
    assert len(story.taken(CancelSequence)) == 3 and CancelSequence(mine) not in story.posted
    assert [len(found(story, 2, f"j{place}").requests) for place in range(5)] == [0, 0, 0, 1, 1]


def test_what_was_to_be_done_by_now_ends_here_whether_or_not_its_router_says_so() -> None:
    story, number = begun(remaining_s=5.0)
    left = story.submit(1, "s#1", name="s", kept=Kept("k"), remaining_s=7.0)
    story.tell(events.RouterSaid(1, Cancel("s#1", lets_go=True)))
    story.after(4.9)
    assert story.taken(CancelSequence) == []
    story.after(0.1)
    assert story.last(1).refusal is Refusal.DEADLINE_EXCEEDED and story.posted[-1] == CancelSequence(number)
    story.after(2.0)
    assert story.posted[-1] == CancelSequence(left) and story.core.is_idle
    assert story.core.counters["requests_too_late"] == 2


def test_who_joins_with_more_time_keeps_it_running() -> None:
    story, number = begun(remaining_s=5.0)
    join(story, 2)
    story.after(6.0)
    story.say(number, "r#1", 1, 8)
    assert story.tokens(2, "r~2#1") == [7, 8] and story.taken(CancelSequence) == []


def test_who_hears_of_a_request_that_is_moved_is_told_where_it_is() -> None:
    story, number = begun()
    join(story, 2)
    story.ask(9, permitted("r#1"), 3)
    story.step((number, Output("r#1", 1, finish_reason=FinishReason.MOVED)))
    assert (story.last(2).finish_reason, story.last(2).message) == (FinishReason.MOVED, ASKER)
    assert story.last(1).message == "", "its own router has had it moved"
    join(story, 2)
    assert story.last(2).refusal is Refusal.NOT_KEPT


def test_a_request_that_was_moved_here_is_told_from_where_anybody_is() -> None:
    story = WorkerStory(Role.DECODE)
    story.attach(1)
    story.attach(2)
    moved = make_request(range(5, 105), 50, request_id="r#2", replay=(7,))
    number = story.submit(1, moved, name="r", kept=Kept("j"), migration=Migration(PEER, "r#1"))
    story.step(transfers=[TransferWanted(number, 0, (3, 4))])
    story.tell(events.HandoffEnded(number, Handoff(SequenceMoved((7, 8, 9), 101, 4), "shm", 4096, 0.01)))
    story.tell(events.RouterSaid(2, Adopt("r", "r~2#2", 3, joins=True)))
    story.say(number, "r#2", 3, 10)
    assert story.tokens(2, "r~2#2") == [10]
    assert found(story, 2).requests[0].is_whole
    story.tell(events.RouterSaid(2, Adopt("r", "r~3#1", 0, joins=True)))
    assert story.tokens(2, "r~3#1") == [7, 8, 9, 10]


def test_one_name_is_one_request_for_a_router_also_where_it_joins() -> None:
    story, number = begun()
    join(story, 2)
    for attempt in ("r~2#1", "r~2#1"):
        join(story, 2, attempt)
        assert story.last(2).refusal is Refusal.INVALID
    story.tell(events.RouterSaid(1, Adopt("r", "r#1", 0, joins=True)))
    assert story.last(1).refusal is Refusal.INVALID
    story.say(number, "r#1", 1, 8)
    assert [o.token_ids for o in story.heard(2) if o.token_ids] == [(7,), (8,)]


def test_what_is_kept_no_more_comes_as_tokens_where_these_say_everything() -> None:
    story, number = begun(max_kept_tokens=2)
    for place in range(1, 6):
        story.say(number, "r#1", place, 10 + place)
    assert found(story, 2).requests[0].is_whole
    join(story, 2)
    assert story.tokens(2, "r~2#1") == [7, 11, 12, 13, 14, 15]
    story, number = begun(max_kept_tokens=2, logprobs=1)
    for place in range(1, 6):
        story.step((number, story.last(1)._replace(position=place, token_ids=(9,), logprobs=(TokenLogprob(9, -1.0),))))
    assert not found(story, 2).requests[0].is_whole
    join(story, 2)
    assert story.last(2).refusal is Refusal.NOT_KEPT


def test_tokens_that_another_worker_said_are_not_made_up_for_who_joins() -> None:
    """A running request went on at its source after it had been sent here: positions 1 to 4 were never said by this worker."""
    story, number = begun()
    story.say(number, "r#1", 5, 12)
    story.say(number, "r#1", 6, 13)
    (running,) = found(story, 2).requests
    assert not running.is_whole and running.num_tokens == 7
    join(story, 2)
    assert story.tokens(2, "r~2#1") == []


def test_a_job_that_is_ended_is_stopped_and_all_who_hear_of_it_are_told() -> None:
    story, number = begun()
    join(story, 2)
    story.attach(3)
    assert len(found(story, 3, ends=True).requests) == 1
    assert story.last(1).refusal is story.last(2).refusal is Refusal.CANCELLED
    assert story.posted[-1] == CancelSequence(number) and story.core.is_idle
    assert found(story, 3).requests == ()


def test_what_waits_at_one_router_is_told_to_the_others_as_long_as_it_waits_there() -> None:
    story, _ = begun()
    for left in (events.RouterSaid(1, Waits("w")), events.RouterLost(1)):
        story.tell(events.RouterSaid(1, Waits("w", 2, b"question")))
        waits = found(story, 2, "w")
        assert (waits.is_waiting, waits.ticket, waits.num_requests, waits.requests) == (True, b"question", 2, ())
        assert not found(story, 2, "other").is_waiting
        story.tell(left)
        assert not found(story, 2, "w").is_waiting, "a dead router's requests are waited for by nobody"


def test_the_other_routers_hear_of_a_job_that_one_has_ended() -> None:
    story, _ = begun()
    story.tell(events.RouterSaid(2, Find(7, "j", ends=True)))
    assert not any(frame.ended_jobs for frames in story.frames.values() for frame in frames), "others tell it"
    story.tell(events.RouterSaid(2, Find(8, "gone", ends=True, relays=True)))
    told = {session: [job for frame in frames for job in frame.ended_jobs] for session, frames in story.frames.items()}
    assert told == {1: ["gone"], 2: []}, "also of one that is not here"


def test_what_a_router_says_of_what_waits_there_is_bounded() -> None:
    waiting = WaitingJobs()
    for number in range(MAX_JOBS + 10):
        waiting.say(1, Waits(f"j{number}", 1))
    assert len(waiting) == MAX_JOBS
    waiting.say(1, Waits("j0"))
    waiting.say(1, Waits("large", 1, bytes(MAX_TICKET_BYTES + 1)))
    assert waiting.get("large") is waiting.get("j0") is None
    waiting.say(1, Waits("fits", 1, bytes(MAX_TICKET_BYTES)))
    waiting.say(2, Waits("of another", 1, bytes(MAX_TICKET_BYTES)))
    assert waiting.get("fits") is not None and waiting.get("of another") is not None
    waiting.lose(1)
    assert len(waiting) == 1
