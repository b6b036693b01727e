"""Stories about how a request gets in, ends, and what a router knows of caches; no network and no clock."""

from __future__ import annotations

from router_story import GENERATION, MIXED, Story, messages, outputs, request, the_submit

from router.events import Detach, Reject, RequestArrived, RequestCancelled, ShutDown
from workers.errors import Refusal
from workers.status import KvEvent, Role
from workers.wire.attach import Cancel, DumpRequest, WorkerFrame


def test_without_any_worker_ever_a_request_is_refused_at_once() -> None:
    (rejection,) = Story().tell(RequestArrived(request()))
    assert isinstance(rejection, Reject) and rejection.refusal is Refusal.NO_WORKERS


def test_the_queue_is_bounded_and_takes_the_most_urgent_first() -> None:
    story = Story(("m-0", Role.MIXED), max_running=1, max_queue=3)
    story.tell(RequestArrived(request("running")))
    for name, priority in (("a", 1), ("b", 0), ("c", 0)):
        assert story.tell(RequestArrived(request(name, priority=priority))) == []
    (rejection,) = story.tell(RequestArrived(request("d", priority=-1)))
    assert isinstance(rejection, Reject) and rejection.refusal is Refusal.QUEUE_FULL
    order = []
    running = "running"
    for _ in range(3):
        _, submit = the_submit(story.output("m-0", f"{running}#1", 0, 1, finish=True))
        running = submit.request.request_id.removesuffix("#1")
        order.append(running)
    assert order == ["b", "c", "a"]


def test_a_request_that_cannot_fit_is_the_callers_fault() -> None:
    story = Story(("m-0", Role.MIXED))
    for bad in (request(prompt=()), request(prompt=tuple(range(5000)))):
        (rejection,) = story.tell(RequestArrived(bad))
        assert isinstance(rejection, Reject) and rejection.refusal is Refusal.INVALID


def test_a_cancelled_request_is_cancelled_on_its_worker_and_forgotten() -> None:
    story = Story(("m-0", Role.MIXED), max_running=1)
    story.tell(RequestArrived(request()))
    story.tell(RequestArrived(request("waiting")))
    assert story.tell(RequestCancelled("waiting")) == []
    assert messages(story.tell(RequestCancelled("r")), Cancel) == [Cancel("r#1")]
    assert story.output("m-0", "r#1", 0, 5) == []
    assert len(story.core.flights) == 0 and story.count("stale_outputs") == 1


def test_a_request_that_takes_too_long_is_ended() -> None:
    story = Story(("m-0", Role.MIXED), request_timeout_s=2.0)
    story.tell(RequestArrived(request()))
    commands = story.after(3.0)
    assert [output.refusal for output in outputs(commands)] == [Refusal.DEADLINE_EXCEEDED]
    assert messages(commands, Cancel) == [Cancel("r#1")]


def test_shutting_down_ends_everything() -> None:
    story = Story(*MIXED)
    story.tell(RequestArrived(request()))
    commands = story.tell(ShutDown())
    assert [output.refusal for output in outputs(commands)] == [Refusal.SHUTTING_DOWN]
    assert sum(isinstance(command, Detach) for command in commands) == 2
    assert [type(command) for command in story.tell(RequestArrived(request("late")))] == [Reject]
    assert story.after(10.0) == []


def test_a_missed_cache_event_asks_for_a_dump_once() -> None:
    story = Story(("m-0", Role.MIXED))
    story.frame("m-0", WorkerFrame(GENERATION, kv_events=(KvEvent(1, (11, 12)),)))
    gap = story.frame("m-0", WorkerFrame(GENERATION, kv_events=(KvEvent(3, (13,)),)))
    assert messages(gap, DumpRequest) == [DumpRequest()]
    assert story.frame("m-0", WorkerFrame(GENERATION, kv_events=(KvEvent(4, (14,)),))) == []
    story.frame("m-0", WorkerFrame(GENERATION, kv_events=(KvEvent(4, (11, 13, 14), reset=True), KvEvent(5, (15,)))))
    assert [int(story.core.index.match([block], 1).cached[0]) for block in (11, 12, 13, 14, 15)] == [1, 0, 1, 1, 1]
    assert story.count("prefix_index_gaps") == 1
