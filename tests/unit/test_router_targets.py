"""Requests with targets: who goes first, and which are refused because what they want is out of reach; no network and no clock."""

from __future__ import annotations

import pytest
from router_story import FREE, GENERATION, MODEL, PD, Story, outputs, request, submits

from router.events import Command, Reject, RequestArrived
from router.forecast.forecasts import Lead
from router.requests.admission import AdmissionQueue
from router.wishes import Wishes
from workers.errors import Refusal
from workers.request import FinishReason, Output
from workers.status import Load, Role, WorkerStatus
from workers.wire.attach import WorkerFrame

STEP_S, PROMPT_S = 0.005, 1e-3
"""Of the workers in these stories; a prompt of 1,000 tokens takes a second."""


def fleet(**settings: object) -> Story:
    """Workers whose times are known."""
    story = Story(*PD, max_local_prefill_tokens=0, **settings)
    for tick in range(40):
        for worker in story.connections:
            num_prompt = (0, 64, 512)[tick % 3]
            step_s = (STEP_S + num_prompt * PROMPT_S) * (1 + tick % 5 / 1000)
            load = Load(0, 0, 0, 0, 1000, 1000, step_s, 1, 10, num_prompt, num_prompt * 256)
            story.frame(worker, WorkerFrame(GENERATION, load=load))
        story.after(0.1)
    return story


def arrive(story: Story, name: str, num_prompt: int, ttft_s: float = 0.0, tpot_s: float = 0.0) -> list[Command]:
    first = sum(map(ord, name)) % 300
    prompt = tuple(range(first, first + num_prompt))
    return story.tell(RequestArrived(request(name, prompt, 1000), Wishes(ttft_s, tpot_s)))


def refusals(commands: list[Command]) -> list[Reject]:
    return [command for command in commands if isinstance(command, Reject)]


# ---- the queue ----


def test_whose_first_token_is_due_first_goes_first_and_without_targets_who_came_first() -> None:
    queue = AdmissionQueue()
    queue.push("a", 0, 1, due_s=30.0, patient_until_s=30.0)
    queue.push("b", 0, 2, due_s=31.0, patient_until_s=31.0)
    queue.push("soon", 0, 3, due_s=3.0, patient_until_s=32.0)
    queue.push("urgent", -1, 4, due_s=99.0, patient_until_s=99.0)
    order = []
    while name := queue.first(1.0):
        order.append(name)
        queue.remove(name)
    assert order == ["urgent", "soon", "a", "b"]


def test_one_that_is_late_lets_those_pass_that_can_still_be_in_time_but_not_for_ever() -> None:
    queue = AdmissionQueue()
    queue.push("late", 0, 1, due_s=2.0, patient_until_s=30.0)
    queue.push("in time", 0, 2, due_s=4.0, patient_until_s=32.0)
    assert queue.first(1.0) == "late"
    assert queue.first(3.0) == "in time"
    queue.push("much later", 0, 3, due_s=40.0, patient_until_s=70.0)
    queue.remove("in time")
    assert queue.first(35.0) == "late"


def test_one_that_cannot_be_in_time_any_more_lets_those_pass_that_can() -> None:
    queue = AdmissionQueue()
    queue.push("long", 0, 1, due_s=4.0, patient_until_s=30.0, late_s=1.0)
    queue.push("short", 0, 2, due_s=5.0, patient_until_s=31.0, late_s=4.5)
    assert queue.first(0.5) == "long"
    assert queue.first(2.0) == "short", "the long one would begin too late for its first token to be in time"
    queue.remove("short")
    assert queue.first(2.0) == "long"


def test_how_long_a_first_token_takes_is_learnt_by_the_length_of_prompts() -> None:
    lead = Lead()
    assert lead.expect(1000) == 0.0, "nothing is foretold that was not measured"
    for turn in range(60):
        for num_tokens in (200, 1000, 4000):
            lead.note(num_tokens, 0.3 + num_tokens * 1e-3 + (turn % 5) * 0.01)
    assert 1.2 < lead.expect(1000) < 1.5 and 8.0 < lead.expect(8000) < 8.7
    for _ in range(300):
        for num_tokens in (200, 1000, 4000):
            lead.note(num_tokens, 0.1 + num_tokens * 1e-4)
    assert lead.expect(1000) < 0.3, "what was long ago does not count"
    alike = Lead()
    for _ in range(20):
        alike.note(500, 0.5)
    assert alike.expect(5000) == pytest.approx(0.5), "one length tells nothing of others"


def test_requests_without_targets_are_served_as_ever_whatever_the_admission() -> None:
    sent = []
    for admission in ("soft", "strict"):
        story = fleet(admission=admission)
        for index in range(12):
            arrive(story, f"q{index}", 900)
        sent.append([(worker, submit.request.request_id) for worker, submit in submits(story.commands)])
    assert sent[0] == sent[1] and [name for _, name in sent[0]] == [f"q{index}#1" for index in range(8)]


# ---- what can be kept ----


def test_strict_refuses_what_cannot_be_kept_and_nothing_else() -> None:
    """Each prompt takes a second: on two prefill workers the n-th one that comes at once has its first token after ceil(n / 2) s."""
    story = fleet(admission="strict")
    accepted = []
    for index in range(12):
        commands = arrive(story, f"q{index}", 1000, ttft_s=3.5)
        for rejection in refusals(commands):
            assert rejection.refusal is Refusal.TARGET_MISSED and rejection.retry_after_s is not None
            assert "later than ttft = 3.5 s" in rejection.message and rejection.retry_after_s >= 1
        accepted.append(not refusals(commands))
    assert accepted == [True] * 6 + [False] * 6
    assert not refusals(arrive(story, "patient", 1000, ttft_s=4.5)), "what has more time is taken"
    assert not refusals(arrive(story, "no target", 1000))
    assert story.count("rejected_target_missed") == 6


def test_soft_refuses_nothing() -> None:
    story = fleet()
    assert not any(refusals(arrive(story, f"q{index}", 1000, ttft_s=1.5)) for index in range(12))


def test_the_router_s_own_line_counts() -> None:
    story = fleet(admission="strict", prefill_backlog_tokens=1000)
    for index in range(6):
        arrive(story, f"q{index}", 1000)
    assert story.core.flights.num_waiting == 4
    (rejection,) = refusals(arrive(story, "q", 1000, ttft_s=3.5))
    assert "4." in rejection.message or "3." in rejection.message
    assert not refusals(arrive(story, "r", 1000, ttft_s=6.0))


def test_a_pace_that_no_worker_keeps_is_refused() -> None:
    story = fleet(admission="strict")
    (rejection,) = refusals(arrive(story, "fast", 10, tpot_s=STEP_S / 2))
    assert "more than tpot = 0.0025 s" in rejection.message
    assert not refusals(arrive(story, "slower", 10, tpot_s=STEP_S * 3))


def test_targets_of_the_settings_hold_for_requests_that_name_none() -> None:
    story = fleet(admission="strict", ttft_target_s=0.5)
    assert refusals(arrive(story, "long", 1000))
    assert not refusals(arrive(story, "patient", 1000, ttft_s=5.0))
    for number in (1, 2):
        commands = story.tell(RequestArrived(request(f"round {number}", tuple(range(1000))), Wishes(round=number)))
        assert bool(refusals(commands)) is (number == 1), "only the first round of a search has a first token"


def test_one_that_has_waited_too_long_is_given_up_before_work_is_spent_on_it() -> None:
    story = Story(("m-0", Role.MIXED), admission="strict", worker_backlog=1)
    status = WorkerStatus("m-0", GENERATION, Role.MIXED, MODEL, FREE, pid=1, max_num_seqs=1)
    for tick in range(40):
        load = Load(0, 0, 0, 0, 1000, 1000, STEP_S * (1 + tick % 5 / 1000), 1, 10, 0, 0)
        story.frame("m-0", WorkerFrame(GENERATION, load=load, status=status))
        story.after(0.1)
    for name in ("runs", "backlog", "waits"):
        arrive(story, name, 10, ttft_s=3.0)
    assert story.core.flights.num_waiting == 1
    story.ticks(3.5)
    end = Output("runs#1", 0, (5,), finish_reason=FinishReason.LENGTH)
    commands = story.frame("m-0", WorkerFrame(GENERATION, (end,), Load(0, 1, 0, 0, 1000, 1000)))
    (given_up,) = [output for output in outputs(commands) if output.request_id == "waits"]
    assert given_up.refusal is Refusal.TARGET_MISSED and submits(commands) == []


@pytest.mark.parametrize("admission", ["soft", "strict"])
def test_before_anything_was_measured_nothing_is_refused(admission: str) -> None:
    story = Story(*PD, admission=admission)
    assert not refusals(arrive(story, "q", 1000, ttft_s=1e-3))
