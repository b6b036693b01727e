"""Requests wait in the router's queue, not at workers: they are sent into known room and a small backlog, and never wait for nothing."""

from __future__ import annotations

from router_story import GENERATION, MODEL, Story, request, submits, the_submit

from router.events import Command, RequestArrived, RequestCancelled
from workers.errors import Refusal
from workers.request import FinishReason, Output
from workers.status import Load, Role, WorkerStatus
from workers.wire.attach import WorkerFrame


def tell(
    story: Story, worker: str, role: Role = Role.MIXED, max_num_seqs: int = 2, free: int = 1000, **load: int
) -> list[Command]:
    """A worker's status with this load."""
    told = Load(num_free_blocks=free, num_blocks=1000, **load)
    status = WorkerStatus(worker, GENERATION, role, MODEL, told, pid=1, max_num_seqs=max_num_seqs)
    return story.frame(worker, WorkerFrame(GENERATION, status=status))


def arrive(story: Story, *names: str, prompt: tuple[int, ...] = (1, 2, 3), priority: int = 0) -> list[str]:
    """The workers that they go to at once."""
    chosen = []
    for name in names:
        chosen += [
            worker for worker, _ in submits(story.tell(RequestArrived(request(name, prompt, priority=priority))))
        ]
    return chosen


def end(story: Story, worker: str, name: str, load: Load) -> list[Command]:
    output = Output(name, 0, (5,), finish_reason=FinishReason.LENGTH)
    return story.frame(worker, WorkerFrame(GENERATION, (output,), load))


def test_what_no_worker_can_run_soon_waits_in_the_queue_and_goes_where_a_slot_comes_free_first() -> None:
    story = Story(("m-0", Role.MIXED), ("m-1", Role.MIXED), worker_backlog=1)
    for worker in story.connections:
        tell(story, worker)
    sent = arrive(story, *[f"r{index}" for index in range(10)])
    assert sorted(sent) == ["m-0"] * 3 + ["m-1"] * 3, "two run, one is to follow"
    assert story.core.flights.num_waiting == 4
    assert submits(tell(story, "m-0", num_running=2, num_waiting=1)) == []
    first = next(iter(story.core.fleet.at(1).attempts))
    after = end(story, "m-1", first, Load(num_running=2, num_free_blocks=1000, num_blocks=1000))
    worker, submit = the_submit(after)
    assert (worker, submit.request.request_id) == ("m-1", "r6#1")


def test_the_most_urgent_goes_first_whenever_it_came() -> None:
    story = Story(("m-0", Role.MIXED), worker_backlog=1)
    tell(story, "m-0")
    arrive(story, "a", "b", "c", "late")
    assert arrive(story, "urgent", priority=-1) == []
    order = []
    for name in ("a", "b", "c"):
        load = Load(num_running=2, num_free_blocks=1000, num_blocks=1000)
        order += [submit.request.request_id for _, submit in submits(end(story, "m-0", f"{name}#1", load))]
    assert order == ["urgent#1", "late#1"]


def test_a_worker_whose_pool_is_full_gets_no_more_than_the_backlog() -> None:
    story = Story(("m-0", Role.MIXED), worker_backlog=2)
    tell(story, "m-0", max_num_seqs=64, free=3, num_running=5)
    long = tuple(range(40))  # ten blocks
    assert len(arrive(story, "a", "b", "c", "d", prompt=long)) == 2
    assert submits(tell(story, "m-0", max_num_seqs=64, free=3, num_running=5, num_waiting=2)) == []
    assert len(submits(tell(story, "m-0", max_num_seqs=64, free=100, num_running=4))) == 2


def test_a_request_that_fits_nowhere_goes_to_an_idle_worker_which_says_so() -> None:
    story = Story(("m-0", Role.MIXED))
    tell(story, "m-0", max_num_seqs=1, free=2)
    assert arrive(story, "huge", prompt=tuple(range(4000))) == ["m-0"]
    story.refuse("m-0", "huge#1", Refusal.INVALID)
    assert len(story.core.flights) == 0


def test_a_first_in_line_that_needs_much_is_not_overtaken_for_ever() -> None:
    story = Story(("m-0", Role.MIXED), worker_backlog=1)
    tell(story, "m-0", max_num_seqs=64, free=3, num_running=5, num_waiting=1)
    assert arrive(story, "large", "small", prompt=tuple(range(40))) == []
    sent = submits(tell(story, "m-0", max_num_seqs=64, free=3, num_running=5))
    assert [submit.request.request_id for _, submit in sent] == ["large#1"], "it waits there for its blocks"


def test_a_load_that_is_older_than_what_was_sent_gives_no_room() -> None:
    story = Story(("m-0", Role.MIXED), worker_backlog=1, settle_s=0.5)
    tell(story, "m-0", max_num_seqs=2)
    assert len(arrive(story, *"abcdef")) == 3
    story.ticks(1.0)
    assert submits(tell(story, "m-0", max_num_seqs=2)) == [], "it says that nothing runs there; three were sent"
    story.tell(RequestCancelled("a"))
    assert len(story.core.fleet.at(0).attempts) == 3


def test_what_other_routers_have_there_counts() -> None:
    story = Story(("m-0", Role.MIXED), worker_backlog=1)
    tell(story, "m-0", max_num_seqs=8, num_running=8, num_waiting=1)
    assert arrive(story, "a") == []
    assert len(submits(tell(story, "m-0", max_num_seqs=8, num_running=7))) == 1


def test_a_worker_that_does_not_say_how_many_run_at_once_is_bounded_by_its_blocks_alone() -> None:
    story = Story(("m-0", Role.MIXED))
    tell(story, "m-0", max_num_seqs=0, free=10**6)
    assert len(arrive(story, *[f"r{index}" for index in range(100)])) == 100


def test_prompts_wait_until_one_who_computes_them_has_little_to_do() -> None:
    story = Story(("d-0", Role.DECODE), ("p-0", Role.PREFILL), prefill_backlog_tokens=100)
    tell(story, "d-0", Role.DECODE, max_num_seqs=64)
    tell(story, "p-0", Role.PREFILL, max_num_seqs=64)
    prompts = [tuple(range(index, index + 80)) for index in range(0, 400, 100)]
    sent = [worker for index, prompt in enumerate(prompts) for worker in arrive(story, f"r{index}", prompt=prompt)]
    assert sent == ["d-0", "d-0"], "below its bound a worker takes a prompt of any length"
    before = story.core.flights.num_tried
    for _ in range(20):
        tell(story, "d-0", Role.DECODE, max_num_seqs=64)
    assert story.core.flights.num_tried == before, "room to decode is not what they wait for"
    first = story.output("d-0", "r0#1", 0, 5)
    assert [submit.request.request_id for _, submit in submits(first)] == ["r2#1"]


def test_a_prompt_that_is_computed_again_is_owed_until_its_run_goes_on_and_not_until_its_end() -> None:
    story = Story(("d-0", Role.DECODE), ("p-0", Role.PREFILL), prefill_backlog_tokens=100)
    for worker, role in (("d-0", Role.DECODE), ("p-0", Role.PREFILL)):
        tell(story, worker, role, max_num_seqs=64)
    assert arrive(story, "r", prompt=tuple(range(120))) == ["d-0"]
    story.output("d-0", "r#1", 0, 5)
    story.lose("d-0")
    story.after(0.2)
    _, again = the_submit(tell(story, "d-0", Role.DECODE, max_num_seqs=64))
    assert again.request.replay_token_ids == (5,)
    assert arrive(story, "next", prompt=tuple(range(80))) == []
    assert [submit.request.request_id for _, submit in submits(story.output("d-0", "r#2", 1, 6))] == ["next#1"]


def test_a_mixed_worker_computes_what_no_prefill_worker_has_room_for() -> None:
    story = Story(("m-0", Role.MIXED), ("p-0", Role.PREFILL), prefill_backlog_tokens=100)
    tell(story, "m-0", max_num_seqs=64)
    tell(story, "p-0", Role.PREFILL, waiting_prefill_tokens=500)
    _, submit = the_submit(story.tell(RequestArrived(request(prompt=tuple(range(80))))))
    assert submit.prefill_workers == ()


def test_where_nobody_prefills_those_that_decode_have_the_bound_of_prompts() -> None:
    story = Story(("d-0", Role.DECODE), ("d-1", Role.DECODE), prefill_backlog_tokens=100)
    tell(story, "d-0", Role.DECODE, waiting_prefill_tokens=500)
    tell(story, "d-1", Role.DECODE, waiting_prefill_tokens=500)
    assert arrive(story, "a", prompt=tuple(range(80))) == []
    worker, submit = the_submit(tell(story, "d-1", Role.DECODE))
    assert (worker, submit.prefill_workers) == ("d-1", ())


def test_while_the_first_in_line_finds_no_room_frames_of_full_workers_look_for_no_route() -> None:
    story = Story(*[(f"m-{index}", Role.MIXED) for index in range(10)], worker_backlog=1)
    for worker in story.connections:
        tell(story, worker, max_num_seqs=1, num_running=1, num_waiting=1)
    arrive(story, *[f"r{index}" for index in range(20)])
    before = story.core.flights.num_tried
    for _ in range(5):
        for worker in story.connections:
            tell(story, worker, max_num_seqs=1, num_running=1, num_waiting=1)
    assert story.core.flights.num_tried == before
    assert len(submits(tell(story, "m-3", max_num_seqs=1))) == 2
