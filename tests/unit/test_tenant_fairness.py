"""Who sends most does not get most: tenants share the workers by weight, and one that asks for less than its share waits for no other's backlog."""

from __future__ import annotations

import itertools
import random
from collections import Counter

from router_story import MIXED, Story, messages, outputs, request, submits

from cluster.sim.load import TraceRequest
from cluster.sim.record import RequestRecord
from cluster.sim.settings import Settings
from cluster.sim.simulation import simulate
from router.events import Reject, RequestArrived
from router.requests.fair_queue import MAX_SAVED, QUANTUM_TOKENS, FairQueue
from router.requests.sharers import ASKS_S
from router.wishes import Wishes
from workers.errors import Refusal
from workers.wire.attach import Cancel


def drained(queue: FairQueue, num_taken: int) -> list[str]:
    """Tenants in the order in which their requests are taken; names are `tenant/number`."""
    taken = []
    for _ in range(num_taken):
        name = queue.first(0.0)
        assert name is not None and queue.first(0.0) == name, "asking changes nothing"
        queue.take(name)
        taken.append(name.partition("/")[0])
    return taken


def test_work_is_shared_by_weight_whatever_its_requests_are_like() -> None:
    queue, rng = FairQueue(100_000), random.Random(3)
    sizes = {"small": (10, 50), "large": (9000, 40_000), "mixed": (1, 20_000)}
    weights = {"small": 1.0, "large": 2.0, "mixed": 1.0}
    costs: dict[str, float] = {}
    for tenant, bounds in sizes.items():
        total = 0.0
        while total < 4_000_000:
            name = f"{tenant}/{len(costs)}"
            costs[name] = rng.uniform(*bounds)
            total += costs[name]
            queue.push(name, 0, len(costs), tenant=tenant, weight=weights[tenant], num_tokens=costs[name])
    done: Counter[str] = Counter()
    while sum(done.values()) < 6_000_000:
        name = queue.first(0.0)
        assert name is not None
        queue.take(name)
        done[name.partition("/")[0]] += costs[name]
    shares = {tenant: done[tenant] / weights[tenant] for tenant in sizes}
    assert max(shares.values()) - min(shares.values()) <= 3 * 40_000 + MAX_SAVED * QUANTUM_TOKENS


def test_one_that_comes_now_and_then_goes_next_and_one_that_always_waits_gets_its_share_only() -> None:
    queue = FairQueue(10_000)
    for number in range(200):
        queue.push(f"hog/{number}", 0, number, tenant="hog", num_tokens=1000)
    drained(queue, 40)
    queue.push("guest/0", 0, 1000, tenant="guest", num_tokens=1000)
    assert drained(queue, 1) == ["guest"]
    turns = []
    for number in range(1, 60):  # it sends the next one whenever one is taken: each time it is new in the queue
        queue.push(f"guest/{number}", 0, 1000 + number, tenant="guest", num_tokens=1000)
        while True:
            turns += drained(queue, 1)
            if turns[-1] == "guest":
                break
    saved = MAX_SAVED * QUANTUM_TOKENS / 1000
    assert 0 <= turns.count("guest") - turns.count("hog") <= saved + 4, "its share, and what it had saved"


def test_priorities_count_within_a_tenant_and_workers_hear_of_none() -> None:
    story = Story(*MIXED, max_running=1)
    story.tell(RequestArrived(request("running"), Wishes(tenant="a")))
    story.tell(RequestArrived(request("a-late", priority=5), Wishes(tenant="a")))
    story.tell(RequestArrived(request("b-urgent", priority=-100), Wishes(tenant="b")))
    story.tell(RequestArrived(request("a-soon", priority=-1), Wishes(tenant="a")))
    order = []
    for _ in range(3):
        worker, submit = submits(story.commands)[-1]
        story.output(worker, submit.request.request_id, 0, *range(8), finish=True)
        order.append(submits(story.commands)[-1][1])
    named = [submit.request.request_id.partition("#")[0] for submit in order]
    assert named.index("a-soon") < named.index("a-late") and sorted(named) == ["a-late", "a-soon", "b-urgent"]
    assert {submit.request.priority for submit in order} == {0}


def test_a_full_queue_has_room_for_the_others() -> None:
    story = Story(*MIXED, max_running=1, max_queue=8)
    story.tell(RequestArrived(request("running"), Wishes(tenant="hog")))
    rejected = []
    for number in range(20):
        rejected += story.tell(RequestArrived(request(f"hog-{number}"), Wishes(tenant="hog")))
    assert {command.refusal for command in rejected if isinstance(command, Reject)} == {Refusal.QUEUE_FULL}
    assert story.core.flights.num_waiting == 4
    assert not story.tell(RequestArrived(request("guest"), Wishes(tenant="guest"))), "it waits, and is not refused"
    alone = Story(*MIXED, max_running=1, max_queue=8)
    for number in range(9):
        assert not any(isinstance(c, Reject) for c in alone.tell(RequestArrived(request(f"r{number}"))))


def test_less_waits_at_workers_while_several_tenants_ask() -> None:
    """Of prompts with 100 tokens each; what waits at a worker is computed before whatever comes."""
    story = Story(*MIXED, max_running=1000, prefill_backlog_tokens=10_000, worker_stale_s=100.0)

    def ask(tenant: str, count: int) -> int:
        """How many of so many requests are sent at once."""
        before = len(submits(story.commands))
        for _ in range(count):
            number = next(numbers)
            prompt = tuple(range(number, number + 100))
            story.tell(RequestArrived(request(f"r{number}", prompt), Wishes(tenant=tenant)))
        return len(submits(story.commands)) - before

    numbers = itertools.count(1)
    assert ask("hog", 60) == 60
    assert ask("guest", 1) == 0, "twice 3,000 tokens wait there"
    alone = Story(*MIXED, max_running=1000, prefill_backlog_tokens=10_000, worker_stale_s=100.0)
    alone.tell(RequestArrived(request("first"), Wishes(tenant="guest")))
    story = alone
    assert 2 * 1024 // 100 <= ask("hog", 60) <= 2 * 1024 // 100 + 2
    sent = len(submits(story.commands))
    story.ticks(ASKS_S - 1)
    assert len(submits(story.commands)) == sent
    story.ticks(2.0)
    assert len(submits(story.commands)) == 61, "the guest has asked for nothing for a while"


# ---- deadlines ----


def test_a_request_ends_when_its_client_says_and_its_work_with_it() -> None:
    story = Story(*MIXED, max_running=2)
    story.tell(RequestArrived(request("short"), Wishes(timeout_s=1.0)))
    story.tell(RequestArrived(request("long"), Wishes(timeout_s=5.0)))
    story.tell(RequestArrived(request("waits"), Wishes(timeout_s=0.5)))
    (short, long) = (submit for _, submit in submits(story.commands))
    assert short.remaining_s == 1.0 and long.remaining_s == 5.0, "workers end them by themselves, too"
    commands = story.ticks(0.7)
    assert [(o.request_id, o.refusal) for o in outputs(commands)] == [("waits", Refusal.DEADLINE_EXCEEDED)]
    commands = story.ticks(0.5)
    assert [o.request_id for o in outputs(commands)] == ["short"] and "timeout = 1 s" in outputs(commands)[0].message
    assert messages(commands, Cancel) == [Cancel("short#1")]
    assert [o.request_id for o in outputs(story.ticks(4.0))] == ["long"]
    assert len(story.core.flights) == 0


# ---- measured, in virtual time ----

GUEST_S, HOG_S = 0.5, 0.005
"""Between two requests of each, on average: the hog sends a hundred times as many."""


def arrivals(tenant: str, mean_s: float, prompt: int, until_s: float, first_text: int) -> list[TraceRequest]:
    rng, at_s, found = random.Random(tenant), 0.0, list[TraceRequest]()
    while (at_s := at_s + rng.expovariate(1 / mean_s)) < until_s:
        found.append(TraceRequest(at_s, (first_text + len(found),), prompt, prompt, 32, tenant=tenant))
    return found


def served(trace: list[TraceRequest]) -> dict[str, list[RequestRecord]]:
    """By tenant, two prefill and two decode workers."""
    trace = sorted(trace, key=lambda asked: asked.at_s)
    room = {"max_queue": 256, "max_local_prefill_tokens": 0}
    run = simulate(Settings(num_prefill=2, num_decode=2, router=room, worker={"max_num_seqs": 64}), trace)
    found: dict[str, list[RequestRecord]] = {"guest": [], "hog": []}
    for record in run.requests:
        found[trace[int(record.name[1:]) - 1].tenant].append(record)
    return found


def p99_ttft(records: list[RequestRecord]) -> float:
    times = sorted(record.ttft_s for record in records if record.ttft_s is not None)
    return times[int(0.99 * (len(times) - 1))]


def test_a_tenant_beside_one_that_sends_a_hundred_times_as_much_gets_its_first_tokens_as_if_it_were_alone() -> None:
    guest = arrivals("guest", GUEST_S, 4096, 15.0, 0)
    hog = arrivals("hog", HOG_S, 512, 15.0, 100_000)
    alone, both = served(guest), served(guest + hog)
    assert len(hog) > 90 * len(guest) and any(record.outcome == "queue_full" for record in both["hog"])
    assert all(record.outcome == "ok" for record in both["guest"])
    assert p99_ttft(both["guest"]) <= 1.3 * p99_ttft(alone["guest"])


def test_work_that_nobody_waits_for_is_stopped_within_a_step_of_the_news() -> None:
    """One answer of 5,000 tokens: its client hangs up, or its time is over. Steps are counted; a step takes 4 ms and a message 0.2 ms."""
    settings = Settings(num_prefill=1, num_decode=1, max_leap_s=0.0, router={"max_local_prefill_tokens": 0})
    left = simulate(settings, [TraceRequest(0.0, (1,), 512, 512, 5000, hangs_up_after=40)])
    (record,) = left.requests
    assert record.outcome == "cancelled" and left.num_steps <= 1 + 40 + 2, "one prefill step, and the answer's"
    late = simulate(settings, [TraceRequest(0.0, (1,), 512, 512, 5000, timeout_s=1.0)])
    (record,) = late.requests
    assert record.outcome == "deadline_exceeded" and record.output_tokens > 200
    assert record.finished_s is not None and 1.0 <= record.finished_s <= 1.0 + 0.01, (
        "its worker knows, and waits for no router"
    )
    assert late.num_steps <= 1 + 1.0 / 0.004 + 2
