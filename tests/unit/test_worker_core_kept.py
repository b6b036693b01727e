"""Stories of a worker that keeps requests for routers that have not sent them: found by their job, heard along, told again, ended."""

from __future__ import annotations

from typing import Any

import pytest
from builders import make_request
from worker_story import WorkerStory

from workers.engine.messages import CancelSequence
from workers.errors import Refusal
from workers.request import FinishReason, TokenLogprob
from workers.serving import events
from workers.status import Role
from workers.wire.attach import Adopt, Cancel, Find, Found, Kept


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
    kept = Kept("j", 1, b"ticket", bool(fields.pop("background", False)))
    number = story.submit(1, make_request(range(5, 105), 50, request_id="r#1", **fields), name="r", kept=kept)
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
