"""What a worker decides, told as stories over its pure core: no stream, no thread, no clock."""

from __future__ import annotations

from builders import make_request
from worker_story import GENERATION, WorkerStory

from workers.engine.messages import (
    AddSequence,
    CancelSequence,
    ForgetCache,
)
from workers.errors import Refusal
from workers.handoff.protocol.messages import (
    PromptSubject,
)
from workers.handoff.protocol.source_session import HandoffBroken
from workers.request import FinishReason
from workers.runner import BLOCK_SIZE
from workers.serving import events
from workers.status import Role

PROMPT = make_request(range(5, 5 + 2 * BLOCK_SIZE), 50)


# ---- requests ----


def test_a_request_goes_to_the_engine_and_its_outputs_to_its_own_router() -> None:
    story = WorkerStory()
    story.attach(1)
    story.attach(2)
    a, b = story.submit(1, "r"), story.submit(2, "r")  # two routers may use one name
    assert [type(c) for c in story.posted[-2:]] == [AddSequence, AddSequence] and a != b
    story.say(a, "r", 0, 11)
    story.say(b, "r", 0, 21)
    story.say(a, "r", 1, 12, ends=FinishReason.LENGTH)
    assert story.tokens(1, "r") == [11, 12] and story.tokens(2, "r") == [21]
    assert story.submit(1, "r")  # the name is free again
    assert not story.submit(2, "r") and story.last(2).refusal is Refusal.INVALID


def test_a_cancelled_request_says_nothing_more_and_the_engine_frees_it() -> None:
    story = WorkerStory()
    story.attach(1)
    number = story.submit(1, "r")
    story.cancel(1, "nobody")
    story.cancel(1, "r")
    assert story.posted[-1] == CancelSequence(number)
    story.say(number, "r", 0, 11)  # it was on its way
    assert story.heard(1) == [] and story.core.is_idle


def test_a_router_cannot_cancel_what_belongs_to_another() -> None:
    story = WorkerStory()
    story.attach(1)
    story.attach(2)
    number = story.submit(1, "r")
    story.cancel(2, "r")
    story.say(number, "r", 0, 11)
    assert story.tokens(1, "r") == [11]


def test_what_is_not_taken_is_answered_at_once_with_the_reason() -> None:
    story = WorkerStory(Role.DECODE)
    story.attach(1)
    refusals = []
    for event, undo in (
        (events.SetDrain(True), events.SetDrain(False)),
        (events.Suspend("a rank"), events.Resumed()),
        (events.SwitchRole(Role.PREFILL), events.SwitchRole(Role.DECODE)),
    ):
        story.tell(event)
        assert not story.submit(1, "r")
        refusals.append(story.last(1).refusal)
        story.tell(undo)
        assert story.submit(1, "r")
        story.cancel(1, "r")
    assert not story.submit(1, "old", generation=GENERATION)
    assert [*refusals, story.last(1).refusal] == [
        Refusal.DRAINING, Refusal.SHUTTING_DOWN, Refusal.WRONG_ROLE, Refusal.STALE_GENERATION,
    ]  # fmt: skip


def test_what_an_engine_that_is_far_behind_does_not_take_is_refused_by_name() -> None:
    story = WorkerStory()
    story.attach(1)
    number = story.submit(1, "r")
    story.tell(events.NotAdded(number))
    assert story.last(1).refusal is Refusal.QUEUE_FULL and story.core.is_idle
    (opened,) = story.ask(1, PromptSubject(PROMPT), 2)
    assert isinstance(opened, events.AcceptHandoff)
    story.tell(events.HandoffBegun(1))
    story.tell(events.NotAdded(story.taken(AddSequence)[-1].sequence_id))
    (broken,) = story.fed(1)
    assert isinstance(broken, HandoffBroken) and broken.is_ours


# ---- what the worker is ----


def test_a_switch_raises_the_generation_is_told_to_all_and_lets_what_runs_run() -> None:
    story = WorkerStory()
    story.attach(1)
    story.attach(2)
    number = story.submit(1, "r")
    story.tell(events.SwitchRole(Role.PREFILL))
    assert events.TellRole(Role.PREFILL, GENERATION + 1) in story.others
    for session in (1, 2):
        frame = story.frames[session][-1]
        assert frame.generation == GENERATION + 1 and frame.status is not None and frame.status.role is Role.PREFILL
    story.say(number, "r", 0, 11)
    assert story.tokens(1, "r") == [11]
    story.others.clear()
    story.tell(events.SwitchRole(Role.PREFILL))
    assert not story.others and story.identity.generation == GENERATION + 1


def test_draining_is_remembered_by_the_owner_only_when_it_is_to_outlive_a_restart() -> None:
    story = WorkerStory()
    story.attach(1)
    story.tell(events.SetDrain(True, remember=False))
    assert story.frames[1][-1].status is not None and story.frames[1][-1].status.is_draining
    assert not story.others
    story.tell(events.SetDrain(False))
    assert story.others == [events.TellDrain(False)]


def test_a_worker_that_suspends_gives_everything_back_in_a_new_generation() -> None:
    story = WorkerStory()
    story.attach(1)
    number = story.submit(1, "r")
    story.stuck.add(1)  # a frame is being written when it happens
    story.say(number, "r", 0, 11)
    story.tell(events.Suspend("rank 3"))
    story.tell(events.Suspend("rank 4"))
    story.stuck.clear()
    story.tell(events.FrameWanted(1))
    frame = story.frames[1][-1]
    # Whoever hears of it must not ask for what it ended: the status rides with the frame, in the new generation.
    assert frame.generation == GENERATION + 1 and frame.status is not None and frame.status.is_rebuilding
    assert story.last(1).refusal is Refusal.WORKER_LOST and "rank 3" not in story.last(1).message  # clients read it
    assert [c for c in story.posted if isinstance(c, CancelSequence | ForgetCache)] == [
        CancelSequence(number),
        ForgetCache(),
    ]
    assert events.FailHandoffs("rank 3") in story.others
    story.tell(events.Resumed())
    assert story.submit(1, "again")


def test_a_worker_that_stops_ends_its_requests_and_then_the_streams() -> None:
    story = WorkerStory()
    story.attach(1)
    number = story.submit(1, "r")
    story.stuck.add(1)
    story.say(number, "r", 0, 11)  # this frame is on its way out when the worker stops
    story.tell(events.Close())
    assert not story.ended
    story.stuck.clear()
    story.tell(events.FrameWanted(1))
    assert story.last(1).refusal is Refusal.SHUTTING_DOWN and story.ended == {1}
    assert CancelSequence(number) in story.posted
    story.tell(events.RouterAttached(2, "late"))
    story.tell(events.FrameWanted(2))
    assert story.ended == {1, 2} and len(story.frames[2]) == 1
