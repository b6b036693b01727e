"""A generation rises with each switch for as long as a process can live, and no number of switches looks like another start."""

from __future__ import annotations

import pytest
from router_story import GENERATION, MIXED, Story, outputs, request, the_submit

from router.events import Detach, RequestArrived
from workers.config import WorkerConfig
from workers.status import Role, first_generation, starts_of, switches_of
from workers.worker import Worker

MANY = (65_535, 65_536, 65_537, 1 << 24, (1 << 32) - 1)


@pytest.mark.parametrize("num_switches", MANY)
def test_any_number_of_switches_leaves_the_start_as_it_is_and_the_next_start_is_higher(num_switches: int) -> None:
    generation = first_generation(7) + num_switches
    assert (starts_of(generation), switches_of(generation)) == (7, num_switches)
    assert first_generation(8) > generation


@pytest.mark.parametrize("num_switches", MANY)
def test_a_router_keeps_a_worker_that_has_switched_so_often_and_what_runs_there(num_switches: int) -> None:
    story = Story(*MIXED)
    worker, _ = the_submit(story.tell(RequestArrived(request())))
    told = story.report(worker, Role.MIXED, GENERATION + num_switches)
    assert not any(isinstance(command, Detach) for command in told)
    (heard,) = outputs(story.output(worker, "r#1", 0, 5))
    assert heard.token_ids == (5,)


def test_a_worker_begins_in_the_first_generation_of_its_start() -> None:
    worker = Worker(WorkerConfig(model="unused"), "decode-0", 3, Role.DECODE)
    assert worker._identity.generation == first_generation(3)
