"""What scores of a prompt mean for routing and for another model, and what becomes of attempts that a broken stream left behind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from router_story import (
    FREE,
    GENERATION,
    MIXED,
    MODEL,
    Story,
    messages,
    outputs,
    request,
    submits,
    the_submit,
)

from router.events import RequestArrived, RequestCancelled
from workers.errors import Refusal
from workers.request import Output, Request
from workers.status import Role, WorkerStatus, first_generation
from workers.token_logprobs import PromptScores
from workers.wire.attach import Adopt, Cancel, WorkerFrame


def scored(name: str, num_tokens: int = 120) -> Request:
    asked = request(name, prompt=tuple(range(num_tokens)))
    return replace(asked, params=replace(asked.params, prompt_logprobs=0))


def score_part(request_id: str, num_tokens: int = 20) -> WorkerFrame:
    ids, floats = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.float32)
    none, no_floats = np.zeros((num_tokens, 0), np.int32), np.zeros((num_tokens, 0), np.float32)
    scores = PromptScores(1, ids, floats, ids, none, no_floats)
    return WorkerFrame(GENERATION, (Output(request_id, 0, prompt_logprobs=(scores,)),))


def draining(worker_id: str) -> WorkerFrame:
    status = WorkerStatus(worker_id, GENERATION, Role.MIXED, MODEL, FREE, pid=1, is_draining=True)
    return WorkerFrame(GENERATION, status=status)


def test_an_answer_that_began_with_scores_of_one_model_does_not_go_on_with_another() -> None:
    story = Story(("m-0", Role.MIXED), recovery_timeout_s=60.0)
    story.tell(RequestArrived(scored("r")))
    assert outputs(story.frame("m-0", score_part("r#1")))
    story.lose("m-0")
    story.after(0.5)
    other = replace(MODEL, fingerprint="new")
    commands = story.report("m-0", Role.MIXED, generation=first_generation(2), model=other)
    assert not submits(commands)
    assert [output.refusal for output in outputs(commands)] == [Refusal.NO_WORKERS]


def test_a_prompt_whose_scores_have_begun_is_still_being_computed() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(scored("r")))
    (worker,) = story.core.fleet
    owed = worker.charges.owed_tokens
    story.frame("m-0", score_part("r#1"))
    assert owed and worker.charges.owed_tokens == owed
    story.output("m-0", "r#1", 0, 5)
    assert worker.charges.owed_tokens == 0


def test_a_scored_prompt_is_computed_where_its_answer_is_and_burdens_nobody_else() -> None:
    story = Story(("d-0", Role.DECODE), ("p-0", Role.PREFILL), prefill_backlog_tokens=100)
    _, submit = the_submit(story.tell(RequestArrived(scored("a"))))
    assert submit.prefill_workers == ()
    owed = {worker.worker_id: worker.charges.owed_tokens for worker in story.core.fleet}
    assert owed["p-0"] == 0 and owed["d-0"] > 0
    _, other = the_submit(story.tell(RequestArrived(request("b", prompt=(1, 2, 3)))))
    assert [worker.worker_id for worker in other.prefill_workers] == ["p-0"]


def test_requests_that_are_taken_up_again_leave_the_places_of_migrations_free() -> None:
    story = Story(*[(f"m-{i}", Role.MIXED) for i in range(3)], max_migrations=2)
    for i in range(6):
        story.tell(RequestArrived(request(f"r{i}")))
    for worker in list(story.core.fleet):
        for attempt in list(worker.attempts):
            story.output(worker.worker_id, attempt, 0, 5)
    story.lose("m-0")
    story.after(1.0)
    assert messages(story.report("m-0", Role.MIXED), Adopt)
    story.frame("m-1", draining("m-1"))
    story.after(0.1)
    assert story.count("migrations_begun")


def test_what_waits_when_its_worker_is_back_is_ended_there_if_it_is_sent_elsewhere() -> None:
    story = Story(*MIXED, max_running=1)
    home, _ = the_submit(story.tell(RequestArrived(request("a"))))
    story.output(home, "a#1", 0, 5)
    story.tell(RequestArrived(request("b", priority=-1)))
    ((other, _),) = submits(story.lose(home))
    story.after(1.0)
    story.report(home, Role.MIXED)
    commands = story.output(other, "b#1", 0, 1, finish=True)
    ((target, submit),) = submits(commands)
    assert submit.request.request_id == "a#2"
    ended = [cancel.request_id for cancel in messages(commands, Cancel)]
    assert ended == ([] if target == home else ["a#1"])


def test_what_waits_when_its_worker_is_back_and_is_cancelled_is_ended_there() -> None:
    story = Story(*MIXED, max_running=1)
    home, _ = the_submit(story.tell(RequestArrived(request("a"))))
    story.output(home, "a#1", 0, 5)
    story.tell(RequestArrived(request("b", priority=-1)))
    story.lose(home)
    story.after(1.0)
    story.report(home, Role.MIXED)
    assert [cancel.request_id for cancel in messages(story.tell(RequestCancelled("a")), Cancel)] == ["a#1"]


def test_the_target_of_a_migration_that_lost_its_stream_is_told_when_it_is_back() -> None:
    story = Story(*MIXED)
    home, _ = the_submit(story.tell(RequestArrived(request("a"))))
    target = next(name for name, _ in MIXED if name != home)
    story.output(home, "a#1", 0, 5)
    story.frame(home, draining(home))
    ((moved_to, submit),) = submits(story.after(0.1))
    assert (moved_to, submit.request.request_id) == (target, "a#2")
    story.lose(target)
    story.after(1.0)
    commands = story.report(target, Role.MIXED)
    assert messages(commands, Adopt) or [cancel.request_id for cancel in messages(commands, Cancel)] == ["a#2"]
