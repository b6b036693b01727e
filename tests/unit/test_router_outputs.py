"""Stories about tokens on their way to a client: no gap, no repeat, no wrong one; no network and no clock."""

from __future__ import annotations

import numpy as np
import pytest
from router_story import GENERATION, MIXED, MODEL, Story, messages, outputs, request, the_submit

from router.events import RequestArrived
from workers.errors import Refusal
from workers.request import HandoffReport, Output
from workers.status import Role
from workers.token_logprobs import PromptScores, TokenLogprob
from workers.wire.attach import Cancel, WorkerFrame


def test_outputs_reach_the_client_under_its_own_name() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    (first,) = outputs(story.output("m-0", "r#1", 0, 5, 6))
    (last,) = outputs(story.output("m-0", "r#1", 2, 7, finish=True))
    assert (first.request_id, first.token_ids, last.position, last.finish_reason) == ("r", (5, 6), 2, "length")
    assert story.core.flights.num_running == 0


def test_a_duplicate_frame_is_delivered_once() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    story.output("m-0", "r#1", 0, 5)
    assert outputs(story.output("m-0", "r#1", 0, 5)) == []
    assert story.count("repeated_outputs") == 1


def test_an_overlap_without_text_is_trimmed_with_its_logprobs() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    story.output("m-0", "r#1", 0, 5, 6)
    logprobs = tuple(TokenLogprob(token, -1.0) for token in (6, 7))
    (output,) = outputs(story.frame("m-0", WorkerFrame(GENERATION, (Output("r#1", 1, (6, 7), logprobs=logprobs),))))
    assert (output.position, output.token_ids, output.logprobs) == (2, (7,), logprobs[1:])


def test_an_overlap_whose_text_cannot_be_divided_is_run_again() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    story.output("m-0", "r#1", 0, 5, 6)
    commands = story.output("m-0", "r#1", 1, 6, 7)
    assert outputs(commands) == [] and messages(commands, Cancel) == [Cancel("r#1")]
    assert the_submit(commands)[1].request.replay_token_ids == (5, 6)


def test_wrong_tokens_end_the_request_rather_than_reach_the_client() -> None:
    story = Story(*MIXED)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    story.output(worker, "r#1", 0, 5, 6)
    commands = story.output(worker, "r#1", 0, 5, 9)
    (output,) = outputs(commands)
    assert (output.token_ids, output.refusal, output.position) == ((), Refusal.INTERNAL, 2)
    assert messages(commands, Cancel) == [Cancel("r#1")]


def test_a_gap_is_filled_by_running_again() -> None:
    story = Story(("m-0", Role.MIXED))
    story.tell(RequestArrived(request()))
    story.output("m-0", "r#1", 0, 5)
    commands = story.output("m-0", "r#1", 2, 7)
    assert outputs(commands) == [] and the_submit(commands)[1].request.replay_token_ids == (5,)
    assert outputs(story.output("m-0", "r#1", 3, 8)) == []
    assert story.count("stale_outputs") == 1
    assert outputs(story.output("m-0", "r#2", 1, 6))[0].token_ids == (6,)


SCORES = PromptScores(
    1, *(np.zeros(1, kind) for kind in ("i4", "f4", "i4")), np.zeros((1, 0), "i4"), np.zeros((1, 0), "f4")
)


def test_what_is_said_with_the_first_token_comes_once_although_a_second_worker_says_it_again() -> None:
    story = Story(*MIXED)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    report = HandoffReport("m-0", "m-0", "local")
    scored = Output("r#1", 0, prompt_logprobs=(SCORES,))
    told = Output("r#1", 0, (5,), handoff=report, cached_tokens=4)
    before, first = outputs(story.frame(worker, WorkerFrame(GENERATION, (scored, told))))
    other, _ = the_submit(story.lose(worker))
    again = Output("r#2", 1, (6,), handoff=report, cached_tokens=4)
    (second,) = outputs(story.frame(other, WorkerFrame(GENERATION, (again,))))
    assert before.prompt_logprobs == (SCORES,) and before.handoff is None
    assert (first.handoff, first.cached_tokens) == (report, 4)
    assert (second.handoff, second.cached_tokens) == (None, 0)


PAST = MODEL.vocab_size
IDS = np.array([5, 6], np.int32)
PAST_IDS = np.array([5, PAST], np.int32)
LOGPROBS = np.array([-1.0, -2.0], np.float32)
ALTERNATIVES = np.array([[5], [6]], np.int32), np.array([[-1.0], [-2.0]], np.float32)


@pytest.mark.parametrize(
    "output",
    [
        Output("r#1", 0, (5, PAST)),
        Output("r#1", 0, (5,), logprobs=(TokenLogprob(PAST, -1.0),)),
        Output("r#1", 0, (5,), logprobs=(TokenLogprob(5, -1.0, ((6, -0.5), (2**32 - 1, -0.7))),)),
        Output("r#1", 0, prompt_logprobs=(PromptScores(1, PAST_IDS, LOGPROBS, IDS, *ALTERNATIVES),)),
        Output("r#1", 0, prompt_logprobs=(PromptScores(1, IDS, LOGPROBS, IDS, -ALTERNATIVES[0], ALTERNATIVES[1]),)),
    ],
)
def test_a_worker_that_says_what_is_no_token_is_left_and_the_request_runs_elsewhere(output: Output) -> None:
    story = Story(*MIXED)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    commands = story.frame(worker, WorkerFrame(GENERATION, (output,)))
    assert outputs(commands) == [] and story.count("workers_lost_impossible_tokens") == 1
    assert the_submit(commands)[0] != worker
