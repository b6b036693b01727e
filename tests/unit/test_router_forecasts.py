"""Stories about a router that learns how fast its workers are, and what it does with that; no network and no clock."""

from __future__ import annotations

from router_story import FREE, GENERATION, MIXED, PD, Story, outputs, request, the_submit

from router.events import RequestArrived, RequestCancelled
from workers.request import HandoffReport, Output
from workers.status import Load, Role
from workers.wire.attach import WorkerFrame

STEP_S, PROMPT_S = 0.005, 2e-5


def load(tick: int, slowness: float = 1.0, num_running: int = 0, waiting: int = 0) -> Load:
    """After a step with 8 sequences and now and then some prompt."""
    num_prompt = (0, 512, 2048)[tick % 3]
    step_s = (STEP_S + num_prompt * PROMPT_S) * slowness * (1 + tick % 5 / 1000)
    return Load(0, num_running, 0, waiting, FREE.num_free_blocks, 1000, step_s, 8, 4000, num_prompt, num_prompt * 512)


def learn(story: Story, slow: str = "", num_ticks: int = 40, **loads: Load) -> None:
    for tick in range(num_ticks):
        for worker in story.connections:
            report = loads.get(worker.replace("-", "_"), load(tick, 6.0 if worker == slow else 1.0))
            story.frame(worker, WorkerFrame(GENERATION, load=report))
        story.after(0.1)


def homes(story: Story, count: int = 40) -> list[str]:
    """Where short requests go, one at a time, while nothing else is to do."""
    chosen = []
    for index in range(count):
        worker, _ = the_submit(story.tell(RequestArrived(request(f"q{index}-{story.now}", (index, 5, 7) * 30))))
        story.tell(RequestCancelled(f"q{index}-{story.now}"))
        chosen.append(worker)
    return chosen


def test_a_worker_that_becomes_slow_is_left_and_comes_back_when_it_has_recovered() -> None:
    story = Story(*MIXED)
    learn(story)
    assert 5 < homes(story).count("m-0") < 35
    learn(story, slow="m-0", num_ticks=12)
    assert homes(story).count("m-0") == 0
    learn(story, num_ticks=12)
    assert 5 < homes(story).count("m-0") < 35


def test_what_was_learnt_is_told_by_the_status_of_the_router() -> None:
    story = Story(*MIXED)
    learn(story, slow="m-1", num_ticks=90)
    forecast = story.core.forecasts.status()
    (kind,) = forecast.kinds
    assert kind.num_samples == 180 and dict(kind.seconds)["prompt"] > 0
    table = story.core.fleet.table
    assert table.speeds[story.core.fleet.get("m-1").row] > 3 * table.speeds[story.core.fleet.get("m-0").row]  # type: ignore[union-attr]


def test_what_handoffs_add_is_learnt_from_first_outputs() -> None:
    story = Story(*PD)
    learn(story, num_ticks=30)
    for index in range(30):
        name = f"h{index}"
        worker, submit = the_submit(story.tell(RequestArrived(request(name, tuple(range(3000 + index)), 1000))))
        assert submit.prefill_workers, "a long prompt is computed by a prefill worker"
        report = HandoffReport(submit.prefill_workers[0].worker_id, worker, "tcp", 1 << 20, 0.5, 0.1, exposed_s=0.25)
        story.now += 0.5
        story.frame(worker, WorkerFrame(GENERATION, (Output(submit.request.request_id, 0, (7,), "a", handoff=report),)))
        story.tell(RequestCancelled(name))
        story.after(0.1)
    forecast = story.core.forecasts.status()
    assert forecast.num_handoffs == 30 and forecast.num_ttft == 30
    assert abs(forecast.handoff_s + forecast.handoff_block_s * (1 << 20) - 0.25) < 0.05


def test_a_worker_that_takes_the_row_of_another_does_not_inherit_its_speed() -> None:
    story = Story(*MIXED)
    learn(story, slow="m-0")
    story.core.fleet.set_members(story.members[1:])
    story.lose("m-0")
    story.after(0.1)
    story.core.fleet.set_members(story.members)
    story.after(5.0)
    story.report("m-0", Role.MIXED)
    entry = story.core.fleet.get("m-0")
    assert entry is not None and story.core.fleet.table.speeds[entry.row] == 1.0
    assert outputs(story.commands) == []


# ---- prefill here or there ----


def prefillers(story: Story, name: str, num_prompt: int) -> int:
    """How many prefill workers a request of so many tokens is told of; 0: its decode worker computes the prompt."""
    first = sum(map(ord, name)) * 7
    _, submit = the_submit(story.tell(RequestArrived(request(name, tuple(range(first, first + num_prompt))))))
    story.tell(RequestCancelled(name))
    return len(submit.prefill_workers)


def test_an_idle_decode_worker_computes_short_prompts_itself_and_a_busy_one_does_not() -> None:
    story = Story(*PD)
    assert prefillers(story, "unknown", 100) > 0, "before anything was measured prompts go where they always went"
    learn(story)
    assert prefillers(story, "idle", 100) == 0
    assert prefillers(story, "long", 2049) > 0
    busy = Load(0, 60, 0, 0, 1000, 1000, 0.02, 60, 60_000, 0, 0)
    learn(story, num_ticks=3, d_0=busy, d_1=busy)
    assert prefillers(story, "busy", 100) > 0, "sixty answers would wait for this prompt"


def test_where_prefill_workers_have_long_lines_more_is_computed_where_it_decodes() -> None:
    story = Story(*PD)
    learn(story)
    some = Load(0, 6, 0, 0, 1000, 1000, 0.0061, 6, 6000, 0, 0)
    learn(story, num_ticks=3, d_0=some, d_1=some)
    assert prefillers(story, "quiet", 1500) > 0
    line = load(1, waiting=25_000)
    learn(story, num_ticks=3, d_0=some, d_1=some, p_0=line, p_1=line)
    assert prefillers(story, "crowded", 1500) == 0


def test_an_operator_may_keep_prompts_off_decode_workers() -> None:
    story = Story(*PD, max_local_prefill_tokens=0)
    learn(story)
    assert prefillers(story, "short", 3) > 0
