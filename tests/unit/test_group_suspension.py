"""What routers and other workers see while a group waits for a rank: values and fake models, no ranks and no Ray."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from builders import generate_alone, make_request
from router_story import FREE, GENERATION, MODEL, Story, request, the_submit
from running_workers import Attached, pair, running, tokens

from router.events import Command, Deliver, RequestArrived
from workers.errors import Refusal
from workers.group.watch import GroupWatch
from workers.status import RankStatus, Role, WorkerStatus
from workers.wire.attach import WorkerFrame
from workers.wire.attach_protobuf import status_from_pb, status_to_pb

PROMPT = list(range(20, 300))
RANKS = (RankStatus(0, "a", 11, 4, is_alive=True), RankStatus(1, "b", 12, 0, is_alive=False, shares_memory=False))


def rebuilding(worker: str, generation: int, is_rebuilding: bool) -> WorkerFrame:
    status = WorkerStatus(worker, generation, Role.DECODE, MODEL, FREE, pid=1, is_rebuilding=is_rebuilding)
    return WorkerFrame(generation, status=status)


def test_a_rebuilding_worker_gets_no_request_and_those_it_gave_back_run_elsewhere() -> None:
    story = Story(("d-0", Role.DECODE), ("d-1", Role.DECODE))
    worker, submit = the_submit(arrive(story, "r"))
    story.output(worker, submit.request.request_id, 0, 7, 8)
    story.frame(worker, rebuilding(worker, GENERATION + 1, True))
    other, again = the_submit(story.refuse(worker, submit.request.request_id, Refusal.WORKER_LOST))
    assert other != worker and again.request.replay_token_ids == (7, 8)
    assert [the_submit(arrive(story, name))[0] for name in ("s", "t")] == [other, other]


def test_with_no_other_worker_requests_wait_for_the_group_to_be_whole() -> None:
    story = Story(("d-0", Role.DECODE))
    _, submit = the_submit(arrive(story, "r"))
    story.frame("d-0", rebuilding("d-0", GENERATION + 1, True))
    assert not [
        c for c in story.refuse("d-0", submit.request.request_id, Refusal.WORKER_LOST) if isinstance(c, Deliver)
    ]
    story.after(5.0)
    _, again = the_submit(story.frame("d-0", rebuilding("d-0", GENERATION + 1, False)))
    assert again.generation == GENERATION + 1


def arrive(story: Story, name: str) -> list[Command]:
    return story.tell(RequestArrived(request(name)))


def test_the_state_of_ranks_survives_the_wire() -> None:
    status = replace(rebuilding("d-0", 5, True).status, ranks=RANKS)  # type: ignore[type-var]
    assert status is not None and status_from_pb(status_to_pb(status)) == status


async def test_a_suspended_prefill_worker_gives_up_its_handoffs_and_decode_computes_by_itself() -> None:
    async with pair() as (router, source, prefill):
        server = prefill._driver
        assert server is not None
        await router.submit(make_request(PROMPT, max_tokens=6, request_id="a"), source)
        server.suspend("rank 1: a test")
        assert prefill.status().generation == source.generation + 1 and prefill.status().is_rebuilding
        await router.submit(
            make_request(PROMPT[1:], max_tokens=6, request_id="b"), replace(source, generation=source.generation + 1)
        )
        for name, prompt in (("a", PROMPT), ("b", PROMPT[1:])):
            found = await router.finish(name)
            assert tokens(found) == generate_alone(make_request(prompt, max_tokens=6))
            assert found[0].handoff is not None and found[0].handoff.transport == "local"
        server.resume()
        prompt = PROMPT[2:]
        await router.submit(
            make_request(prompt, max_tokens=6, request_id="c"), replace(source, generation=source.generation + 1)
        )
        found = await router.finish("c")
        assert found[0].handoff is not None and found[0].handoff.prefill_worker == "prefill-0"
        await router.idle()


async def test_a_suspended_worker_forgets_what_its_prefix_cache_held() -> None:
    async with running("mixed-0", Role.MIXED) as (worker, address):
        router = await Attached(address).start()
        cached = []
        for name, generation in (("a", 0), ("b", 0), ("c", 1)):
            if generation:
                assert worker._driver is not None
                worker._driver.suspend("a test")
                worker._driver.resume()
            own = address.generation + generation
            await router.submit(make_request(PROMPT, max_tokens=2, request_id=name), generation=own)
            cached.append((await router.finish(name))[0].cached_tokens)
        assert cached[0] == cached[2] == 0 < cached[1]
        await router.close()


class Group:
    """Ranks that are whole or not as the test says."""

    def __init__(self) -> None:
        self.is_serving, self.epoch, self.imbalance_seen, self.is_stopped = True, 1, 1.0, False

    def wait_serving(self, timeout_s: float) -> bool:
        return self.is_serving

    def rank_status(self) -> tuple[RankStatus, ...]:
        return RANKS

    def stop(self) -> None:
        self.is_stopped = True


class Server:
    def __init__(self) -> None:
        self.pending: list[str] = []
        self.changed = asyncio.Event()

    def suspend(self, reason: str) -> None:
        self.pending.append(reason)
        self.changed.set()

    def resume(self) -> None:
        self.pending.append("resumed")
        self.changed.set()

    async def until(self, count: int) -> None:
        while len(self.pending) < count:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 30)


async def test_the_watch_suspends_at_once_tells_who_is_lost_and_resumes_when_the_group_is_whole() -> None:
    lost: list[RankStatus] = []
    watch, group, server = GroupWatch(60.0, lambda rank, reason: lost.append(rank)), Group(), Server()
    await watch.wait_formed(group)
    watch.start(server)
    group.is_serving = False
    await asyncio.to_thread(watch.lost, 1, "no sign of life")
    await server.until(1)
    assert server.pending == ["rank 1: no sign of life"] and lost == [RANKS[1]]
    group.is_serving = True
    await server.until(2)
    assert server.pending[1] == "resumed"
    counters = dict(watch.counters())
    assert (counters["ranks_lost"], counters["rebuilds"]) == (1, 1) and counters["rebuild_seconds"] > 0
    await watch.stop()
    assert group.is_stopped


async def test_a_group_that_does_not_find_together_suspends_its_worker_though_nobody_was_lost() -> None:
    watch, group, server = GroupWatch(0.0, lambda rank, reason: None), Group(), Server()
    await watch.wait_formed(group)
    watch.start(server)
    group.is_serving = False
    await server.until(1)
    assert server.pending == ["its ranks do not find together"]
    await watch.stop()
