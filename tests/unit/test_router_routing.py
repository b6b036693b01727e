"""Stories about which workers get a request, and what they are told of each other; no network and no clock."""

from __future__ import annotations

from router_story import GENERATION, MIXED, MODEL, PD, Story, request, the_submit

from router.events import RequestArrived
from workers.kv_cache.block_hash import block_hashes
from workers.status import KvEvent, Load, ModelInfo, PrefixHint, Role, Tier, WorkerAddress
from workers.wire.attach import WorkerFrame


def test_a_request_goes_to_a_decode_worker_with_the_prefill_workers_to_try() -> None:
    worker, submit = the_submit(Story(*PD).tell(RequestArrived(request())))
    assert worker.startswith("d-") and submit.generation == GENERATION
    assert {address.worker_id for address in submit.prefill_workers} == {"p-0", "p-1"}
    assert submit.request.request_id == "r#1"


def test_a_lone_mixed_worker_computes_the_prompt_itself() -> None:
    worker, submit = the_submit(Story(("m-0", Role.MIXED)).tell(RequestArrived(request())))
    assert (worker, submit.prefill_workers) == ("m-0", ())


def test_without_prefill_workers_a_decode_worker_computes_the_prompt_itself() -> None:
    story = Story(*PD)
    story.lose("p-0")
    story.lose("p-1")
    assert the_submit(story.tell(RequestArrived(request())))[1].prefill_workers == ()


def test_a_burst_spreads_before_any_load_report_arrives() -> None:
    story = Story(*PD)
    decode, prefill = [], []
    for index in range(20):
        prompt = tuple(range(index * 50, index * 50 + 40))
        worker, submit = the_submit(story.tell(RequestArrived(request(f"r{index}", prompt))))
        decode.append(worker)
        prefill.append(submit.prefill_workers[0].worker_id)
    assert decode.count("d-0") == 10 and prefill.count("p-0") == 10


def test_a_load_report_of_before_the_burst_does_not_hide_it() -> None:
    story = Story(*PD)
    first, _ = the_submit(story.tell(RequestArrived(request("a"))))
    story.report(first, Role.DECODE)
    assert the_submit(story.tell(RequestArrived(request("b", (7, 8)))))[0] != first
    story.after(1.0)
    for worker in ("d-0", "d-1"):
        story.report(worker, Role.DECODE)
    assert all(not entry.charges for entry in story.core.fleet if entry.worker_id.startswith("d-"))


def test_a_request_goes_where_its_prefix_is_cached() -> None:
    for holder in ("m-0", "m-1"):
        story = Story(*MIXED)
        prompt = tuple(range(400))
        event = KvEvent(1, tuple(block_hashes(prompt, MODEL.block_size)))
        story.frame(holder, WorkerFrame(GENERATION, kv_events=(event,)))
        assert the_submit(story.tell(RequestArrived(request(prompt=prompt))))[0] == holder


def told(prompt: tuple[int, ...], tier: Tier = Tier.POOL, num_blocks: int | None = None) -> WorkerFrame:
    """A worker's first word on what it caches."""
    hashes = tuple(block_hashes(prompt, MODEL.block_size)[:num_blocks])
    return WorkerFrame(GENERATION, kv_events=(KvEvent(1, hashes, tiers=(tier,) * len(hashes)),))


def test_a_prefix_on_disk_is_better_than_none_and_worse_than_one_in_the_pool() -> None:
    prompt = tuple(range(400))
    settings = {"lower_tier_cost_tokens": 1}
    for holder in ("m-0", "m-1"):
        story = Story(*MIXED, **settings)
        story.frame(holder, told(prompt, Tier.DISK))
        assert the_submit(story.tell(RequestArrived(request(prompt=prompt))))[0] == holder
        story = Story(*MIXED, **settings)
        story.frame(holder, told(prompt))
        story.frame("m-0" if holder == "m-1" else "m-1", told(prompt, Tier.DISK))
        assert the_submit(story.tell(RequestArrived(request(prompt=prompt))))[0] == holder


def test_the_worker_that_computes_a_prompt_is_told_who_has_its_beginning() -> None:
    prompt = tuple(range(400))
    story = Story(*PD, pull_min_blocks=10)
    story.frame("d-1", told(prompt, num_blocks=60))
    story.report("d-1", Role.DECODE, load=Load(num_running=50, num_free_blocks=1000))
    worker, submit = the_submit(story.tell(RequestArrived(request(prompt=prompt))))
    assert worker == "d-0"
    assert submit.prefix == PrefixHint(WorkerAddress("d-1", GENERATION, "host:d-1"), 60)


def test_nobody_is_sent_for_few_blocks_or_for_what_is_on_a_disk() -> None:
    prompt = tuple(range(400))
    for frame, least in ((told(prompt, num_blocks=9), 10), (told(prompt, Tier.DISK), 10), (told(prompt), 0)):
        story = Story(*PD, pull_min_blocks=least)
        story.frame("d-1", frame)
        assert the_submit(story.tell(RequestArrived(request(prompt=prompt))))[1].prefix is None
    story = Story(*PD, pull_min_blocks=10)
    story.frame("d-1", told(prompt, num_blocks=60))
    for prefill in ("p-0", "p-1"):
        story.frame(prefill, told(prompt, Tier.HOST, num_blocks=55))
    assert the_submit(story.tell(RequestArrived(request(prompt=prompt))))[1].prefix is None


def test_a_cached_prefix_does_not_outweigh_a_long_line() -> None:
    story = Story(*MIXED)
    prompt = tuple(range(400))
    event = KvEvent(1, tuple(block_hashes(prompt, MODEL.block_size)))
    story.frame("m-0", WorkerFrame(GENERATION, kv_events=(event,), load=Load(num_running=30, num_free_blocks=1000)))
    assert the_submit(story.tell(RequestArrived(request(prompt=prompt))))[0] == "m-1"


def test_a_worker_without_room_for_the_kv_comes_last() -> None:
    story = Story(*MIXED)
    story.report("m-0", Role.MIXED, load=Load(num_free_blocks=1, num_blocks=1000))
    story.report("m-1", Role.MIXED, load=Load(num_running=9, num_free_blocks=900, num_blocks=1000))
    assert the_submit(story.tell(RequestArrived(request())))[0] == "m-1"


def test_round_robin_takes_workers_in_turn() -> None:
    story = Story(*PD, policy="round_robin")
    routes = [the_submit(story.tell(RequestArrived(request(f"r{index}")))) for index in range(4)]
    assert [worker for worker, _ in routes] == ["d-0", "d-1", "d-0", "d-1"]
    assert [submit.prefill_workers[0].worker_id for _, submit in routes] == ["p-0", "p-1", "p-0", "p-1"]


def test_a_worker_of_another_model_gets_nothing() -> None:
    story = Story(("m-0", Role.MIXED), ("m-1", Role.MIXED))
    story.report("m-1", Role.MIXED, model=ModelInfo("other", "other", 10, 4096, 4))
    assert {the_submit(story.tell(RequestArrived(request(f"r{i}"))))[0] for i in range(4)} == {"m-0"}
