"""A request belongs to its worker: what becomes of it when its router is lost, and how another takes it up. Over the pure core."""

from __future__ import annotations

import numpy as np
import pytest
from builders import make_request
from worker_story import ASKER, WorkerStory, permitted

from workers.engine.messages import AddSequence, CancelSequence, EndMove
from workers.errors import Refusal
from workers.handoff.protocol.messages import RunningSubject
from workers.request import FinishReason, Output
from workers.serving import events
from workers.status import Role
from workers.token_logprobs import PromptScores, TokenLogprob
from workers.trust.permits import make_permit
from workers.wire.attach import Adopt, Cancel, DumpRequest, Submit

GRACE_S = 30.0


def running(num_tokens: int = 3, **settings: object) -> tuple[WorkerStory, int]:
    """A request "r" that its router, session 1, calls "r#1", and has so many tokens of: 10, 11, ..."""
    story = WorkerStory(orphan_grace_s=GRACE_S, **settings)
    story.attach(1)
    number = story.submit(1, make_request(range(5, 105), 50, request_id="r#1"), name="r")
    for position in range(num_tokens):
        story.say(number, "r#1", position, 10 + position)
    return story, number


# ---- left behind ----


def test_a_request_outlives_its_router_for_the_grace_and_no_longer() -> None:
    story, number = running()
    story.lose(1)
    story.after(GRACE_S - 0.1)
    assert not story.taken(CancelSequence) and not story.core.is_idle
    story.after(0.2)
    assert story.taken(CancelSequence) == [CancelSequence(number)] and story.core.is_idle
    story.attach(2)
    story.adopt(2, "r", "r#2", 3)
    assert story.last(2).refusal is Refusal.NOT_KEPT


def test_without_a_grace_the_requests_of_a_lost_router_end_with_it() -> None:
    story = WorkerStory(orphan_grace_s=0.0)
    story.attach(1)
    number = story.submit(1, "r")
    story.lose(1)
    assert story.taken(CancelSequence) == [CancelSequence(number)] and story.core.is_idle


def test_of_too_many_orphans_the_oldest_are_given_up() -> None:
    story = WorkerStory(max_orphans=2)
    story.attach(1)
    numbers = [story.submit(1, f"r{index}") for index in range(4)]
    story.lose(1)
    assert story.taken(CancelSequence) == [CancelSequence(number) for number in numbers[:2]]
    assert story.core.counters["orphans_given_up"] == 2


def test_an_orphan_is_cancelled_by_whoever_knows_its_name() -> None:
    story, number = running()
    story.lose(1)
    story.attach(2)
    story.cancel(2, "r#1")
    assert story.taken(CancelSequence) == [CancelSequence(number)]


def test_a_request_that_its_router_runs_again_here_goes_on_instead() -> None:
    story, number = running(3)
    story.lose(1)
    story.say(number, "r#1", 3, 13)
    story.attach(2)
    again = make_request(range(5, 105), 50, request_id="r#2", replay=(10, 11))
    story.posted.clear()
    story.submit(2, again, name="r")
    story.say(number, "r#1", 4, 14, ends=FinishReason.STOP)
    assert story.posted == [] and story.tokens(2, "r#2") == [12, 13, 14]


@pytest.mark.parametrize("kept", [0, 8])
def test_what_is_run_again_and_cannot_go_on_replaces_what_was_left_behind(kept: int) -> None:
    story, number = running(3, max_kept_tokens=kept)
    story.lose(1)
    story.attach(2)
    prompt = range(5, 105) if kept == 0 else range(6, 106)  # nothing is kept, or the name is all that is the same
    story.submit(2, make_request(prompt, 50, request_id="r#2", replay=(10, 11)), name="r")
    assert story.taken(CancelSequence) == [CancelSequence(number)]
    again = story.taken(AddSequence)[-1].sequence_id
    story.say(again, "r#2", 2, 12)
    assert story.tokens(2, "r#2") == [12]


def test_an_attempt_that_is_refused_leaves_the_orphan_alone() -> None:
    story, number = running()
    story.lose(1)
    story.attach(2)
    assert not story.submit(2, make_request(range(5, 105), request_id="r#2"), name="r", generation=7)
    story.adopt(2, "r", "r#3", 3)
    story.say(number, "r#1", 3, 13)
    assert story.tokens(2, "r#3") == [13]


# ---- taken up ----


@pytest.mark.parametrize("position", range(6))
def test_another_router_hears_every_token_from_where_its_client_is(position: int) -> None:
    story, number = running(3)
    story.lose(1)
    for later in (3, 4):
        story.say(number, "r#1", later, 10 + later)
    story.attach(2)
    story.adopt(2, "r", "r#2", position)
    story.say(number, "r#1", 5, 15, ends=FinishReason.LENGTH)
    assert story.tokens(2, "r#2") == list(range(10 + position, 16))
    assert story.heard(2)[0].position == position and story.last(2).finish_reason is FinishReason.LENGTH
    assert story.core.is_idle and not story.taken(CancelSequence)


def test_text_logprobs_and_what_is_said_once_come_again_as_they_were() -> None:
    story, number = running(0)
    logprob = TokenLogprob(7, -0.5, ((7, -0.5), (8, -1.0)))
    floats, ids = np.zeros((2, 1), np.float32), np.ones((2, 1), np.int32)
    scores = PromptScores(1, ids[:, 0], floats[:, 0], ids[:, 0], ids, floats)
    first = Output("r#1", 0, (7,), "he", (logprob,), cached_tokens=64, prompt_logprobs=(scores,))
    held_back, last = (
        Output("r#1", 1, (8,), ""),
        Output("r#1", 2, (9,), "llo", finish_reason=FinishReason.STOP, stop_reason="!"),
    )
    story.step((number, first))
    story.lose(1)
    story.step((number, held_back))
    story.step((number, last))
    story.attach(2)
    story.adopt(2, "r", "r#2", 0)
    assert [(o.position, o.text, o.logprobs, o.prompt_logprobs, o.cached_tokens, o.stop_reason) for o in story.heard(2)] == [
        (o.position, o.text, o.logprobs, o.prompt_logprobs, o.cached_tokens, o.stop_reason) for o in (first, held_back, last)
    ]  # fmt: skip


def test_outputs_of_one_position_are_kept_together_or_not_at_all() -> None:
    story, number = running(0, max_kept_tokens=8)
    floats, ids = np.zeros((4, 1), np.float32), np.ones((4, 1), np.int32)
    scores = PromptScores(1, ids[:, 0], floats[:, 0], ids[:, 0], ids, floats)
    for output in (
        Output("r#1", 0, prompt_logprobs=(scores,)),
        Output("r#1", 0, (7,), "a"),
        Output("r#1", 1, (8,), "b"),
    ):
        story.step((number, output))
    story.lose(1)
    story.attach(2)
    story.adopt(2, "r", "r#2", 0)  # the first token is no use without the scores that went before it
    assert story.last(2).refusal is Refusal.NOT_KEPT
    story.adopt(2, "r", "r#3", 1)
    assert story.tokens(2, "r#3") == [8]


def test_what_ended_unheard_is_kept_for_the_grace() -> None:
    story, number = running(2)
    story.lose(1)
    story.say(number, "r#1", 2, 12, ends=FinishReason.STOP)
    assert story.core.is_idle  # it holds nothing of the engine's
    story.after(GRACE_S - 1)
    story.attach(2)
    story.adopt(2, "r", "r#2", 1)
    assert story.tokens(2, "r#2") == [11, 12] and story.last(2).finish_reason is FinishReason.STOP
    story.after(1.0)
    story.adopt(2, "r", "r#3", 1)  # its end has been written: nobody needs it any more
    assert story.last(2).refusal is Refusal.NOT_KEPT


def test_a_client_that_has_all_but_the_end_hears_of_the_end() -> None:
    story, number = running(2)
    story.lose(1)
    story.say(number, "r#1", 2, 12, ends=FinishReason.STOP)
    story.attach(2)
    story.adopt(2, "r", "r#2", 3)
    assert (story.last(2).position, story.last(2).token_ids, story.last(2).finish_reason) == (3, (), FinishReason.STOP)


@pytest.mark.parametrize("is_taken", [False, True])
def test_an_end_whose_frame_was_never_written_can_be_taken_up(is_taken: bool) -> None:
    story, number = running(2)
    story.stuck.add(1)
    story.say(number, "r#1", 2, 12)  # this frame hangs
    story.say(number, "r#1", 3, 13, ends=FinishReason.LENGTH)
    if is_taken:  # the one that says so is under way
        story.tell(events.FrameWanted(1))
    story.lose(1)
    story.attach(2)
    story.adopt(2, "r", "r#2", 2)
    assert story.tokens(2, "r#2") == [12, 13]


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.MOVED])
def test_an_orphan_that_ends_without_an_answer_is_run_again_instead(reason: FinishReason) -> None:
    story, number = running(2)
    story.lose(1)
    refusal = Refusal.INTERNAL if reason is FinishReason.ERROR else None
    story.step((number, Output("r#1", 2, finish_reason=reason, refusal=refusal)))
    story.attach(2)
    story.adopt(2, "r", "r#2", 2)
    assert story.last(2).refusal is Refusal.NOT_KEPT and story.core.is_idle


def test_a_request_that_a_router_still_has_goes_to_the_one_that_takes_it_up() -> None:
    story, number = running(2)
    story.attach(2)
    story.adopt(2, "r", "other#1", 1)
    story.say(number, "r#1", 2, 12)
    assert story.tokens(2, "other#1") == [11, 12]
    assert story.last(1).refusal is Refusal.TAKEN_UP and story.last(1).request_id == "r#1"
    story.cancel(1, "r#1")  # its client has gone, which is why another has it
    assert not story.taken(CancelSequence)
    story.lose(2)
    story.adopt(1, "r", "r#2", 3)
    story.say(number, "r#1", 3, 13, ends=FinishReason.STOP)
    assert story.tokens(1, "r#2") == [13]


@pytest.mark.parametrize("position", [5, 7])
def test_what_is_not_kept_from_there_is_refused_and_stays_as_it_is(position: int) -> None:
    story, number = running(3)
    story.lose(1)
    story.attach(2)
    story.adopt(2, "nobody", "x", 0)
    story.adopt(2, "r", "r#2", position)
    assert [o.refusal for o in story.heard(2)] == [Refusal.NOT_KEPT] * 2
    story.adopt(2, "r", "r#3", 3)
    story.say(number, "r#1", 3, 13)
    assert story.tokens(2, "r#3") == [13]


def test_only_so_much_is_kept_of_each_request_and_alternatives_count() -> None:
    story, number = running(10, max_kept_tokens=4)
    story.lose(1)
    story.attach(2)
    story.adopt(2, "r", "old", 5)
    assert story.last(2).refusal is Refusal.NOT_KEPT
    story.adopt(2, "r", "r#2", 6)
    assert story.tokens(2, "r#2") == [16, 17, 18, 19]
    logprob = TokenLogprob(7, -0.5, ((7, -0.5), (8, -1.0), (9, -2.0)))
    story.step((number, Output("r#1", 10, (7,), "", (logprob,))))
    story.lose(2)
    story.attach(3)
    story.adopt(3, "r", "older", 9)
    assert story.last(3).refusal is Refusal.NOT_KEPT
    story.adopt(3, "r", "r#3", 10)
    assert story.tokens(3, "r#3") == [7]


def test_an_orphan_that_nobody_could_take_up_any_more_is_given_up() -> None:
    story, number = running(3, max_kept_tokens=4)
    story.lose(1)
    for position in range(3, 7):
        story.say(number, "r#1", position, 10 + position)
        assert not story.taken(CancelSequence)
    story.say(number, "r#1", 7, 17)  # position 3, where its client can be at most, is gone
    assert story.taken(CancelSequence) == [CancelSequence(number)]


# ---- together with what else happens ----


def test_a_switch_and_draining_leave_orphans_to_whoever_takes_them_up() -> None:
    story, number = running()
    story.lose(1)
    story.tell(events.SwitchRole(Role.PREFILL))
    story.tell(events.SetDrain(True))
    assert not story.core.is_idle  # a worker that is to leave waits for them
    story.attach(2)
    story.adopt(2, "r", "r#2", 3)
    story.say(number, "r#1", 3, 13, ends=FinishReason.STOP)
    assert story.tokens(2, "r#2") == [13] and story.core.is_idle


@pytest.mark.parametrize("event", [events.Suspend("a rank"), events.Close()])
def test_a_worker_that_suspends_or_stops_gives_orphans_up(event: events.Event) -> None:
    story, number = running()
    story.lose(1)
    story.tell(event)
    assert CancelSequence(number) in story.posted and story.core.is_idle


def test_a_request_that_was_taken_up_moves_on_under_its_new_name() -> None:
    story, number = running()
    story.lose(1)
    story.attach(2)
    story.adopt(2, "r", "r#2", 3)
    (old,) = story.ask(1, permitted("r#1"), 3)
    assert isinstance(old, events.RefuseHandoff) and old.refusal is Refusal.NOT_MOVABLE
    assert story.ask(2, permitted("r#2"), 3) == [events.AcceptHandoff(2, is_paced=True)]
    story.tell(events.HandoffReleased(2, ""))
    assert story.posted[-1] == EndMove(number)
    story.step((number, Output("r#1", 3, finish_reason=FinishReason.MOVED)))
    assert (story.last(2).request_id, story.last(2).finish_reason) == ("r#2", FinishReason.MOVED)


@pytest.mark.parametrize(
    ("key", "made_with", "made_for", "is_given"),
    [
        (b"k", b"k", ASKER, True),
        (b"k", b"k", "decode-8", False),
        (b"k", b"another", ASKER, False),
        (b"k", b"", ASKER, False),
    ],
)
def test_a_running_request_is_given_to_the_worker_that_its_router_permits_and_to_nobody_else(
    key: bytes, made_with: bytes, made_for: str, is_given: bool
) -> None:
    story = WorkerStory()
    story.attach(1)
    story.submit(1, make_request(range(5, 105), 50, request_id="r#1"), name="r", key=key)
    (answer,) = story.ask(1, RunningSubject("r#1", make_permit(made_with, made_for)), 3)
    assert isinstance(answer, events.AcceptHandoff) is is_given
    assert story.core.counters["moves_not_permitted"] == (not is_given)
    for permit in (b"", b"x" * 5000):
        (answer,) = story.ask(2, RunningSubject("r#1", permit), 3)
        assert isinstance(answer, events.RefuseHandoff)


def test_who_takes_a_request_up_permits_its_next_move_and_the_router_before_does_not() -> None:
    story = WorkerStory()
    story.attach(1)
    number = story.submit(1, make_request(range(5, 105), 50, request_id="r#1"), name="r", key=b"old")
    story.say(number, "r#1", 0, 11)
    story.lose(1)
    story.attach(2)
    story.tell(events.RouterSaid(2, Adopt("r", "r#2", 1, b"new")))
    (refused,) = story.ask(1, RunningSubject("r#2", make_permit(b"old", ASKER)), 3)
    assert isinstance(refused, events.RefuseHandoff)
    assert story.ask(2, RunningSubject("r#2", make_permit(b"new", ASKER)), 3) == [
        events.AcceptHandoff(2, is_paced=True)
    ]


def test_a_run_that_another_router_began_anew_ends_with_the_stream_of_the_first() -> None:
    story, first = running(3)
    story.attach(2)
    again = make_request(range(5, 105), 50, request_id="r#2", replay=(10, 11))
    second = story.submit(2, again, name="r")
    story.posted.clear()
    story.lose(1)
    assert story.taken(CancelSequence) == [
        CancelSequence(first)
    ]  # nobody could take it up: "r" is the second run's name
    story.say(second, "r#2", 2, 12)
    assert story.tokens(2, "r#2")[-1:] == [12]


# ---- a router attaches anew before its old stream is known dead ----


@pytest.mark.parametrize("how", ["submit", "adopt"])
def test_a_router_that_attaches_anew_goes_on_with_its_requests_though_its_old_stream_seems_alive(how: str) -> None:
    story, number = running(3)
    story.stuck.add(1)
    story.say(number, "r#1", 3, 13)  # into a stream that nobody reads
    story.attach(2, "router-1")
    assert story.cut == {1} and story.core.counters["routers_attached_anew"] == 1
    if how == "submit":
        story.submit(2, make_request(range(5, 105), 50, request_id="r#2", replay=(10, 11)), name="r")
    else:
        story.adopt(2, "r", "r#2", 2)
    story.say(number, "r#1", 4, 14, ends=FinishReason.STOP)
    assert story.tokens(2, "r#2") == [12, 13, 14] and story.core.is_idle
    assert len(story.taken(AddSequence)) == 1 and not story.taken(CancelSequence)


def test_what_an_old_stream_still_carries_is_not_heard_once_its_router_has_attached_anew() -> None:
    story, number = running(3)
    story.attach(2, "router-1")
    story.adopt(2, "r", "r#2", 3)
    before = len(story.posted)
    for late in (
        Cancel("r#2"),  # a name that is in use by now
        Cancel("r#1"),
        Submit(make_request(range(5, 105), 50, request_id="s#1"), story.identity.generation, name="s"),
        Adopt("r", "r#1", 0),
        DumpRequest(),
    ):
        story.tell(events.RouterSaid(1, late))
    for late_event in (events.FrameWanted(1), events.RouterLeft(1), events.RouterLost(1)):
        story.tell(late_event)
    assert len(story.posted) == before
    story.say(number, "r#1", 3, 13, ends=FinishReason.STOP)
    assert story.tokens(2, "r#2") == [13]


def test_of_what_it_left_on_its_old_stream_a_router_ends_what_it_does_not_want() -> None:
    story, number = running(3)
    story.attach(2, "router-1")
    story.cancel(2, "r#1")
    assert story.taken(CancelSequence) == [CancelSequence(number)] and story.core.is_idle


def test_another_router_attaches_and_nobody_loses_anything() -> None:
    story, number = running(3)
    story.attach(2, "router-2")
    story.say(number, "r#1", 3, 13)
    assert not story.cut and story.tokens(1, "r#1") == [10, 11, 12, 13]
