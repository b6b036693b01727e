"""Stories about streams that break while their worker lives on: what the router takes up again, and what it ends there."""

from __future__ import annotations

import pytest
from router_story import GENERATION, MIXED, Story, messages, outputs, request, submits, the_submit

from router.events import JobEnded, JobSought, RequestArrived, RequestCancelled, SendMessage, TellFound
from router.job_part import JobPart
from router.requests.waiting_jobs import MAX_TOLD_AT_ONCE, MAX_TOLD_BYTES
from router.wishes import Wishes
from workers.errors import Refusal
from workers.status import Role
from workers.trust.permits import make_key
from workers.wire.attach import Adopt, Cancel, Find, Found, Kept, Waits, WorkerFrame


def lost(*tokens: int) -> tuple[Story, str, str]:
    """A request whose worker's stream broke after some tokens, and who runs it again."""
    story = Story(*MIXED)
    worker, submit = the_submit(story.tell(RequestArrived(request())))
    assert (submit.name, submit.request.request_id) == ("r", "r#1")
    if tokens:
        story.output(worker, "r#1", 0, *tokens)
    other, again = the_submit(story.lose(worker))
    assert other != worker and (again.name, again.request.request_id) == ("r", "r#2")
    story.after(1.0)
    return story, worker, other


def test_what_goes_on_behind_a_broken_stream_is_taken_up_when_it_is_further() -> None:
    story, worker, other = lost(5, 6)
    assert messages(story.report(worker, Role.MIXED), Adopt) == [Adopt("r", "r#3", 2, make_key(b"", "r#3"))]
    assert outputs(story.output(worker, "r#3", 2, 7, 8))[0].token_ids == (7, 8)
    commands = story.output(other, "r#2", 2, 7)  # it was slower, and is not needed any more
    assert outputs(commands) == [] and messages(commands, Cancel) == [Cancel("r#2")]
    assert outputs(story.output(worker, "r#3", 4, 9, finish=True))[0].token_ids == (9,)


def test_the_new_run_goes_on_when_nothing_was_kept() -> None:
    story, worker, other = lost(5, 6)
    story.report(worker, Role.MIXED)
    assert submits(story.refuse(worker, "r#3", Refusal.NOT_KEPT)) == []
    assert outputs(story.output(other, "r#2", 2, 7, finish=True))[0].token_ids == (7,)


def test_whoever_brings_a_token_first_no_token_is_lost_or_repeated() -> None:
    story, worker, other = lost(5)
    story.report(worker, Role.MIXED)
    told = outputs(story.output(other, "r#2", 1, 6))
    told += outputs(story.output(worker, "r#3", 1, 6))
    told += outputs(story.output(worker, "r#3", 2, 7))
    told += outputs(story.output(other, "r#2", 2, 7))
    told += outputs(story.output(worker, "r#3", 3, 8, finish=True))
    assert [(o.position, o.token_ids) for o in told] == [(1, (6,)), (2, (7,)), (3, (8,))]


def test_what_ended_meanwhile_is_ended_where_it_was_left() -> None:
    story, worker, other = lost(5)
    story.output(other, "r#2", 1, 6, finish=True)
    assert messages(story.report(worker, Role.MIXED), Cancel) == [Cancel("r#1")]
    story, worker, other = lost(5)
    story.tell(RequestCancelled("r"))
    assert messages(story.report(worker, Role.MIXED), Cancel) == [Cancel("r#1")]


def test_a_worker_that_was_restarted_has_nothing_to_take_up() -> None:
    story, worker, _ = lost(5)
    assert messages(story.report(worker, Role.MIXED, generation=GENERATION + (1 << 32)), Adopt) == []
    story.lose(worker)
    story.after(3.0)
    assert messages(story.report(worker, Role.MIXED, generation=GENERATION + (1 << 32)), Adopt) == []


def test_a_request_that_waited_for_its_only_worker_is_run_there_by_the_name_it_had() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    story.output("m-0", "r#1", 0, 5)
    assert submits(story.lose("m-0")) == []
    story.after(1.0)
    _, submit = the_submit(story.report("m-0", Role.MIXED))
    assert (submit.name, submit.request.request_id, submit.request.replay_token_ids) == ("r", "r#2", (5,))
    assert [c for c in story.commands if isinstance(c, SendMessage) and isinstance(c.message, Adopt | Cancel)] == []
    assert outputs(story.output("m-0", "r#2", 1, 6))[0].token_ids == (6,)


def test_what_is_taken_up_tells_neither_how_long_a_first_token_takes_nor_of_demand() -> None:
    for at, is_learnt in (("", True), ("m-0", False), ("gone", True)):
        story = Story(("m-0", Role.MIXED))
        for number in range(20):
            story.tell(RequestArrived(request(f"r{number}"), part=JobPart(name=f"r{number}", at=at)))
            story.after(0.5)
            story.output("m-0", f"r{number}#1", 0, 5, finish=True)
        assert story.count("finished_length") == 20
        assert bool(story.core.forecasts.lead.expect(3)) is is_learnt
        demand = story.core.flights.demand(story.now)
        seen = (demand.ttft_s, demand.tokens_per_s, demand.finished_per_s, demand.output_tokens)
        assert [bool(each) for each in seen] == [is_learnt] * 4


def test_the_rounds_of_a_search_are_one_arrival_and_no_answers() -> None:
    story = Story(("m-0", Role.MIXED))
    for number in range(20):
        story.tell(RequestArrived(request(f"r{number}", max_tokens=1), Wishes(round=number + 1)))
        story.after(0.5)
        story.output("m-0", f"r{number}#1", 0, 5, finish=True)
    demand = story.core.flights.demand(story.now)
    assert story.count("finished_length") == 20 and demand.prompt_tokens == (3,) * 9
    assert demand.arrivals_per_s[2] == pytest.approx(0.1, rel=0.1)
    assert not (demand.ttft_s or demand.tokens_per_s or demand.finished_per_s or demand.output_tokens)


def test_what_waits_here_of_a_job_is_told_with_its_ticket_and_ends_with_it() -> None:
    story = Story(("m-0", Role.MIXED), max_running=1)
    story.tell(RequestArrived(request("running")))
    for choice in range(2):
        part = JobPart(Kept("j", 2, b"" if choice else b"ticket"), f"j-0-{choice}")
        story.tell(RequestArrived(request(f"j-0-{choice}"), part=part))

    def sought(number: int, ends: bool = False) -> TellFound:
        commands = story.tell(JobSought(number, "j", ends))
        assert messages(commands, Find) == [Find(number, "j", ends, relays=ends)]
        ended.extend(output.request_id for output in outputs(commands) if output.refusal is Refusal.CANCELLED)
        told = story.frame("m-0", WorkerFrame(GENERATION, found=(Found(number),)))
        (only,) = [command for command in told if isinstance(command, TellFound)]
        return only

    ended: list[str] = []
    waiting = sought(1).found
    assert (waiting.ticket, waiting.is_waiting, waiting.requests) == (b"ticket", True, {}) and not ended
    assert sought(2, ends=True).found.is_waiting
    assert ended == ["j-0-0", "j-0-1"] and len(story.core.flights) == 1
    assert not sought(3).found.is_waiting


def test_a_worker_is_told_what_waits_here_for_a_while_and_when_that_is_over() -> None:
    story = Story(*MIXED, max_running=1)
    first, running = the_submit(story.tell(RequestArrived(request("running"))))
    for choice in range(2):
        part = JobPart(Kept("j", 2, b"" if choice else b"ticket"), f"j-0-{choice}")
        story.tell(RequestArrived(request(f"j-0-{choice}"), part=part))
    assert not messages(story.after(0.1), Waits), "most wait for less"
    told = [command for command in story.after(0.2) if isinstance(command, SendMessage)]
    assert [command.message for command in told] == [Waits("j", 2, b"ticket")]
    assert not messages(story.ticks(0.5), Waits), "once"
    if told[0].worker_id == first:
        first, running = the_submit(story.lose(first))  # it runs again elsewhere
    else:
        story.lose(told[0].worker_id)
    assert messages(story.after(0.1), Waits) == [Waits("j", 2, b"ticket")], "another one, since that one is lost"
    story.output(first, running.request.request_id, 0, 5, finish=True)
    assert not messages(story.after(0.1), Waits), "its other choice waits still"
    story.tell(RequestCancelled("j-0-0"))
    assert messages(story.after(0.1), Waits) == [Waits("j")]


def test_a_worker_hears_that_a_job_waits_no_more_though_it_has_waited_again_meanwhile() -> None:
    """Both workers refuse it before the next tick, and it leaves the queue again before anybody is told anew."""
    story = Story(*MIXED, max_running=1)
    first, running = the_submit(story.tell(RequestArrived(request("running"))))
    story.tell(RequestArrived(request("j-0-0"), part=JobPart(Kept("j", 1, b"ticket"), "j-0-0")))
    (told,) = [c for c in story.ticks(0.4) if isinstance(c, SendMessage) and isinstance(c.message, Waits)]
    worker, submit = the_submit(story.output(first, running.request.request_id, 0, 5, finish=True))
    worker, submit = the_submit(story.refuse(worker, submit.request.request_id, Refusal.QUEUE_FULL))
    assert not submits(story.refuse(worker, submit.request.request_id, Refusal.QUEUE_FULL))
    later = [c for c in story.ticks(1.0) if isinstance(c, SendMessage)]
    assert [(c.worker_id, c.message) for c in later if isinstance(c.message, Waits)] == [(told.worker_id, Waits("j"))]
    assert submits(list(later)), "it runs"


def test_a_worker_that_comes_up_is_told_little_at_once_and_no_more_than_it_keeps() -> None:
    """Everything has waited for it; requests are to come first."""
    story = Story(("m-0", Role.MIXED), max_running=1)
    story.tell(RequestArrived(request("running")))
    story.lose("m-0")
    for number in range(MAX_TOLD_AT_ONCE + 9):
        story.tell(RequestArrived(request(f"j{number}"), part=JobPart(Kept(f"j{number}", 1, b"t"), f"j{number}")))
    large = bytes(MAX_TOLD_BYTES // 2 - MAX_TOLD_AT_ONCE)
    for name in ("a", "b", "c"):
        story.tell(RequestArrived(request(name), part=JobPart(Kept(name, 1, large), name)))
    assert not messages(story.after(1.0), Waits)
    story.report("m-0", Role.MIXED)
    assert len(messages(story.after(0.1), Waits)) == MAX_TOLD_AT_ONCE
    told = messages(story.after(0.1), Waits)
    assert [waits.job for waits in told][-2:] == ["a", "b"] and len(told) == 11
    assert not messages(story.ticks(0.5), Waits), "there is no room for the third"
    story.tell(RequestCancelled("a"))
    assert messages(story.ticks(0.2), Waits) == [Waits("a"), Waits("c", 1, large)]


def test_a_job_that_another_router_has_ended_waits_no_more_and_is_forgotten() -> None:
    story = Story(("m-0", Role.MIXED), max_running=1)
    story.tell(RequestArrived(request("running")))
    story.tell(RequestArrived(request("j-0-0"), part=JobPart(Kept("j", 1, b"ticket"), "j-0-0")))
    commands = story.frame("m-0", WorkerFrame(GENERATION, ended_jobs=("j", "unknown")))
    assert [(output.request_id, output.refusal) for output in outputs(commands)] == [("j-0-0", Refusal.CANCELLED)]
    assert [c.job for c in commands if isinstance(c, JobEnded)] == ["j", "unknown"] and len(story.core.flights) == 1


def test_what_waits_at_another_router_is_found_as_waiting() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(JobSought(1, "j"))
    told = story.frame("m-0", WorkerFrame(GENERATION, found=(Found(1, (), 1, b"ticket", is_waiting=True),)))
    (found,) = [command.found for command in told if isinstance(command, TellFound)]
    assert (found.ticket, found.is_waiting, found.requests) == (b"ticket", True, {})
