"""What a worker core tells each router, when, and what becomes of one that does not keep up."""

from __future__ import annotations

from worker_story import WorkerStory

from workers.engine.messages import (
    CancelSequence,
    DumpKv,
)
from workers.serving import events
from workers.serving.sessions import LOAD_INTERVAL_S, MAX_CACHE_EVENTS
from workers.status import Load


def test_a_router_that_says_no_more_gets_what_waits_for_it_and_then_its_stream_ends() -> None:
    story = WorkerStory()
    story.attach(1)
    number = story.submit(1, "r")
    story.stuck.add(1)
    story.say(number, "r", 0, 11)
    story.say(number, "r", 1, 12)
    story.tell(events.RouterLeft(1))
    story.stuck.clear()
    story.tell(events.FrameWanted(1))
    assert story.tokens(1, "r") == [11, 12] and story.ended == {1}


# ---- who hears what, and when ----


def test_a_router_without_outputs_hears_of_the_load_a_few_times_a_second_and_not_with_each_step() -> None:
    story = WorkerStory()
    story.attach(1)
    story.attach(2)
    number = story.submit(1, "r")
    story.after(LOAD_INTERVAL_S)
    before = {session: len(story.frames[session]) for session in (1, 2)}
    for position in range(100):
        story.say(number, "r", position, position)
        story.after(0.01)
    assert len(story.frames[1]) - before[1] >= 100
    assert len(story.frames[2]) - before[2] <= 1 / LOAD_INTERVAL_S + 2  # loads, and a status
    assert story.tokens(1, "r") == list(range(100))


def test_the_last_load_of_a_busy_time_is_said_though_no_step_follows() -> None:
    story = WorkerStory()
    story.attach(1)
    story.after(1.1)
    for running in range(5):
        story.step(load=Load(num_running=running))
    assert story.load(1) == Load(num_running=0)
    story.after(LOAD_INTERVAL_S)
    assert story.load(1) == Load(num_running=4)
    said = len(story.frames[1])
    story.after(LOAD_INTERVAL_S)
    assert len(story.frames[1]) == said  # nothing has changed since


def test_every_router_hears_about_once_a_second_that_the_worker_lives() -> None:
    story = WorkerStory()
    story.attach(1)
    story.after(1.0)
    before = len([f for f in story.frames[1] if f.status is not None])
    story.after(10.0)
    assert len([f for f in story.frames[1] if f.status is not None]) - before == 10


def test_a_dump_goes_to_the_router_that_asked_and_the_others_go_on_with_events() -> None:
    story = WorkerStory()
    story.attach(1, dump=(10, 11))
    story.step(stored=(12,))
    story.attach(2, dump=None)
    assert story.posted[-1] == DumpKv(2)
    story.step(stored=(13,))  # the dump that is on its way contains it
    story.step(stored=(14,), dump=(10, 11, 12, 13), askers=[2])
    story.after(LOAD_INTERVAL_S)
    first, second = ([event for frame in story.frames[s] for event in frame.kv_events] for s in (1, 2))
    assert [event.stored for event in first] == [(10, 11), (12,), (13,), (14,)]
    assert [event.stored for event in second] == [(10, 11, 12, 13), (14,)]
    for heard in (first, second):
        assert [event.sequence for event in heard] == list(range(1, len(heard) + 1))  # no gap
        assert [event.reset for event in heard] == [True] + [False] * (len(heard) - 1)


def test_a_dump_that_is_on_its_way_is_not_asked_for_again() -> None:
    story = WorkerStory()
    story.attach(1, dump=None)
    for _ in range(3):
        story.ask_for_dump(1)
    assert story.taken(DumpKv) == [DumpKv(1)]
    story.step(dump=(1,), askers=[1])
    story.ask_for_dump(1)
    assert len(story.taken(DumpKv)) == 2


def test_a_router_that_is_too_far_behind_for_events_gets_one_dump() -> None:
    story = WorkerStory()
    story.attach(1)
    story.after(LOAD_INTERVAL_S)
    story.stuck.add(1)
    story.after(1.0)  # a frame that is never written
    for block in range(MAX_CACHE_EVENTS + 1):
        story.step(stored=(block,))
    story.stuck.clear()
    story.posted.clear()
    story.tell(events.FrameWanted(1))
    story.step(stored=(1000,))
    story.after(1.0)
    assert story.taken(DumpKv) == [DumpKv(1)]
    story.step(dump=(1, 2, 3), askers=[1])
    assert story.frames[1][-1].kv_events[0].reset


def test_a_router_that_does_not_read_is_cut_off_at_the_bound_though_its_write_never_returns() -> None:
    story = WorkerStory(max_pending_frames=2, max_num_seqs=4, orphan_grace_s=0.0)
    story.attach(1)
    story.attach(2)
    slow, fast = story.submit(1, "slow"), story.submit(2, "fast")
    story.stuck.add(1)
    position = 0
    while not story.cut:
        story.say(slow, "slow", position, 1)
        story.say(fast, "fast", position, 1)
        position += 1
        assert position <= 2 * 4 + 2
    assert story.cut == {1} and CancelSequence(slow) in story.posted
    story.say(fast, "fast", position, 1)
    assert len(story.tokens(2, "fast")) == position + 1


# ---- handoffs asked for ----
