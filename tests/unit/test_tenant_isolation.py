"""No tenant learns another's prompts: not from cached tokens, not from where its request goes, not from blocks in lower tiers or at peers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import make_engine, make_request, run_to_end
from router_story import FREE, GENERATION, MODEL, Story, request, the_submit
from test_router_targets import fleet
from tier_rig import GOLDEN, rig
from tier_rig import PROMPT as TIERED

from cluster.sim.load import TraceRequest
from cluster.sim.settings import Settings
from cluster.sim.simulation import simulate
from router.events import Command, RequestArrived, SendMessage
from router.tenants.config import TenantLimits, TenantsConfig
from router.tenants.salts import Salts
from router.tenants.tenancy import Caller, Tenancy
from router.wishes import Wishes
from workers.kv_cache.block_hash import PromptBlocks, PromptTokens, block_hashes
from workers.request import Request
from workers.runner import BLOCK_SIZE
from workers.status import KvEvent, Role
from workers.wire.attach import Submit, WorkerFrame
from workers.wire.request_protobuf import request_from_pb, request_to_pb

PROMPT = PromptTokens(range(5, 5 + 6 * BLOCK_SIZE + 3))


def test_salted_blocks_of_one_prompt_are_found_by_nobody_else() -> None:
    keys = {salt: PromptBlocks.of(PROMPT, BLOCK_SIZE, salt=salt).keys(0, 6) for salt in (0, 7, 8)}
    for one, other in ((0, 7), (7, 8), (0, 8)):
        assert not {key.block_hash for key in keys[one]} & {key.block_hash for key in keys[other]}
        assert not set(keys[one]) & set(keys[other])
    assert [key.parent for key in keys[7][:1]] == [7]
    assert block_hashes(PROMPT, BLOCK_SIZE, 7) == block_hashes(list(PROMPT), BLOCK_SIZE, 7)


def test_the_salt_goes_along_to_workers_with_every_attempt() -> None:
    salted = replace(make_request(PROMPT, 4, request_id="r"), cache_salt=2**64 - 1)
    assert request_from_pb(request_to_pb(salted)).cache_salt == 2**64 - 1
    story = Story(("m-0", Role.MIXED), ("m-1", Role.MIXED))
    worker, submit = the_submit(story.tell(RequestArrived(replace(request(), cache_salt=9))))
    assert submit.request.cache_salt == 9
    story.output(worker, "r#1", 0, 5)
    _, again = the_submit(story.lose(worker))
    assert (again.request.cache_salt, again.request.replay_token_ids) == (9, (5,)), "a replay too"


def test_routing_follows_a_tenants_own_blocks_only() -> None:
    prompt = tuple(range(400))
    story = Story(*((f"m-{at}", Role.MIXED) for at in range(4)))
    own, other = Salts(b"secret").of("own"), Salts(b"secret").of("other")
    hashes = tuple(block_hashes(prompt, MODEL.block_size, own))
    story.frame("m-3", WorkerFrame(GENERATION, kv_events=(KvEvent(1, hashes),), load=FREE))
    asked = replace(request("own", prompt), cache_salt=own)
    assert the_submit(story.tell(RequestArrived(asked)))[0] == "m-3"
    for number, salt in enumerate((other, 0, own + 1)):
        story.tell(RequestArrived(replace(request(f"x{number}", prompt), cache_salt=salt)))
        flight = story.core.flights._flights[f"x{number}"]
        found = story.core.index.match(flight.hashes, 4)
        assert not found.cached.any() and not found.in_pool.any()


ASKED = PromptTokens(range(5, 5 + 900))


def answers_to(asker: int, cached: tuple[int, ...] | None, ttft_s: float) -> list[Command]:
    """What a router does about a prompt of the tenant with the salt `asker`, and says of it, where tenant 7 has had `cached`."""
    story = fleet(admission="strict")
    hashes = () if cached is None else tuple(block_hashes(cached, MODEL.block_size, 7))
    for worker in story.connections:
        story.frame(worker, WorkerFrame(GENERATION, kv_events=(KvEvent(1, hashes),)))
    asked = replace(request("r", ASKED, 64), cache_salt=asker)
    said = story.tell(RequestArrived(asked, Wishes(ttft_s, 0.0, explain=True)))
    return [
        replace(command, message=replace(command.message, key=b""))
        if isinstance(command, SendMessage) and isinstance(command.message, Submit)
        else command
        for command in said
    ]


@pytest.mark.parametrize("ttft_s", [0.0, 0.1, 0.5, 0.95, 2.0])
def test_admission_and_routing_do_not_depend_on_what_another_tenant_has_had(ttft_s: float) -> None:
    """Not whether a prompt is taken, not what the refusal foretells, not where it goes, and not the share that it costs."""
    others = tuple(range(40, 940))
    without = answers_to(8, None, ttft_s)
    assert without and without == answers_to(8, ASKED, ttft_s) == answers_to(8, others, ttft_s)
    if 0.0 < ttft_s < 0.95:
        assert without != answers_to(7, ASKED, ttft_s), "its own blocks count"


def test_as_much_is_computed_in_as_many_steps_whatever_another_tenant_has_had() -> None:
    mine, other = make_request(PROMPT, 4), make_request(range(300, 300 + len(PROMPT)), 4)

    def computed(asker: int, earlier: Request) -> tuple[int, int, float, float]:
        """Of the asker's request: its cached tokens, steps, and the tokens and blocks that it took."""
        engine = make_engine(max_batch_tokens=64)
        engine.add(1, replace(earlier, cache_salt=7))
        run_to_end(engine)
        before, num_free = dict(engine.counters()), engine.load().num_free_blocks
        engine.add(2, replace(mine, cache_salt=asker))
        results = [engine.step()]
        least = engine.load().num_free_blocks
        while engine.has_work:
            results.append(engine.step())
            least = min(least, engine.load().num_free_blocks)
        (cached,) = {output.cached_tokens for result in results for _, output in result.outputs if output.position == 0}
        after = dict(engine.counters())
        return cached, len(results), after["prefill_tokens"] - before["prefill_tokens"], num_free - least

    assert computed(8, mine) == computed(8, other) == computed(7, other)
    assert computed(8, mine)[0] == 0 and computed(7, mine)[0] == 6 * BLOCK_SIZE, "its own blocks count"


@pytest.mark.parametrize("disk", [False, True])
def test_pool_host_memory_and_disk_give_back_only_what_has_the_same_salt(tmp_path: Path, disk: bool) -> None:
    mine = replace(TIERED, cache_salt=7)
    settings: dict[str, Any] = {"folder": tmp_path} if disk else {"num_host": 16}
    with rig(**settings) as tiers:
        assert tiers.ask(mine) == (GOLDEN, 0)
        assert tiers.ask(replace(TIERED, cache_salt=8)) == (GOLDEN, 0)
        tiers.push_out()
        assert tiers.ask(TIERED) == (GOLDEN, 0)
        tiers.push_out()
        assert tiers.ask(mine) == (GOLDEN, 4 * BLOCK_SIZE)
        tiers.push_out()
    if disk:  # after a start, too
        with rig(**settings) as tiers:
            assert tiers.ask(replace(TIERED, cache_salt=9)) == (GOLDEN, 0)
            assert tiers.ask(mine) == (GOLDEN, 4 * BLOCK_SIZE)


def test_in_a_cluster_no_prompt_of_another_tenant_is_found_wherever_it_is_computed() -> None:
    """Prefill at one worker and decode at another, prefixes fetched from peers, workers that die and answers that are replayed."""
    texts = [(number % 3,) for number in range(60)]
    trace = [
        TraceRequest(0.3 * at, text, 2048, 2048, 16, tenant=("a", "b", "")[at // 20]) for at, text in enumerate(texts)
    ]
    settings = Settings(num_prefill=2, num_decode=2, router={"pull_min_blocks": 1})
    run = simulate(settings, trace)
    firsts: dict[tuple[str, tuple[int, ...]], int] = {}
    for record in sorted(run.requests, key=lambda found: int(found.name[1:])):
        asked = trace[int(record.name[1:]) - 1]
        firsts.setdefault((asked.tenant, asked.texts), record.cached_tokens)
    assert len(firsts) == 9 and set(firsts.values()) == {0}, "the first of each tenant finds nothing"
    assert sum(record.cached_tokens for record in run.requests) > 40 * 1024, "the others find their own"


def test_salts_of_a_cluster_are_its_own_and_tenants_that_trust_each_other_may_share() -> None:
    config = TenantsConfig(enabled=True)
    one, again, other = Tenancy(config, secret=b"x"), Tenancy(config, secret=b"x"), Tenancy(config, secret=b"y")
    a, b = Caller("a"), Caller("b")
    assert one.salt(a, "") == again.salt(a, "") != other.salt(a, "")
    assert len({one.salt(a, ""), one.salt(b, ""), one.salt(a, "s"), one.salt(b, "s"), one.salt(a, "t"), 0}) == 6
    sharing = TenantLimits(shared_prefixes=True)
    assert one.salt(Caller("c", sharing), "") == one.salt(Caller("d", sharing), "") == 0
    assert one.salt(Caller("c", sharing), "s") == one.salt(Caller("d", sharing), "s") != 0
    assert Tenancy(TenantsConfig()).salt(Caller(), "") == 0, "without tenants all is as ever"
    assert Salts(b"x").of("ab", "c") != Salts(b"x").of("a", "bc")
