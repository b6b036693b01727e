"""A worker fetches the beginning of a prompt from a peer that has it; whatever goes wrong, it computes it instead."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from builders import fake_runner, generate_alone, make_engine, make_request, run_to_end, step_until, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_worker import CONFIG, Attached, holds_nothing, running, tokens

from workers.client import Cancel, Submit
from workers.config import WorkerConfig
from workers.engine import Engine
from workers.errors import Refused
from workers.kv_cache.block_hash import block_hashes
from workers.kv_cache.prefix_cache import BlockKey, block_key
from workers.kv_tiers.tiers import KvTiers
from workers.kv_transfer.messages import Prefix
from workers.kv_transfer.worth import MEMORY_S, PullRates, is_worth_pulling
from workers.prefix_export import MAX_EXPORTS, keys_of, subject_of
from workers.runner import BLOCK_SIZE
from workers.scheduler.sequence import Kind
from workers.status import PrefixHint, Role, WorkerAddress
from workers.worker import Worker

PROMPT = make_request(range(5, 5 + 8 * BLOCK_SIZE + 9), 16, request_id="r")
GOLDEN = generate_alone(PROMPT)
SHORTER = make_request(PROMPT.prompt_token_ids[: 5 * BLOCK_SIZE + 1], 1, request_id="warm")
"""Leaves 5 blocks of PROMPT in a pool."""
PEER = WorkerAddress("peer", 1 << 16, "127.0.0.1:1")


def keys_of_prompt() -> tuple:  # type: ignore[type-arg]
    hashes = block_hashes(PROMPT.prompt_token_ids, BLOCK_SIZE)
    return tuple(block_key(hashes, PROMPT.prompt_token_ids, i, BLOCK_SIZE) for i in range(len(hashes)))


# ---- decisions ----


def test_pulling_is_worth_it_when_it_beats_computing_and_unknown_rates_are_tried() -> None:
    assert is_worth_pulling(1000, 10_000, prefill_tokens_per_s=100, pull_bytes_per_s=1001)
    assert not is_worth_pulling(1000, 10_000, prefill_tokens_per_s=100, pull_bytes_per_s=999)
    assert is_worth_pulling(1000, 10_000, prefill_tokens_per_s=0, pull_bytes_per_s=1)
    assert is_worth_pulling(1000, 10_000, prefill_tokens_per_s=100, pull_bytes_per_s=0)


def test_a_peer_that_fails_is_slow_for_a_while_and_then_tried_again() -> None:
    rates = PullRates()
    assert rates.rate("p", 0.0) == 0
    rates.note("p", 1000, 1.0, now=1.0)
    assert rates.rate("p", 1.0) == 1000
    rates.note("p", 0, 1.0, now=2.0)
    assert 0 < rates.rate("p", 2.0) < 1000
    assert rates.rate("p", 2.1 + MEMORY_S) == 0
    rates.note("q", 0, 1.0, now=2.0)
    assert not is_worth_pulling(64, 1000, prefill_tokens_per_s=1000, pull_bytes_per_s=rates.rate("q", 2.0))


@given(st.integers(1, 8), st.integers(0, 7))
def test_what_is_asked_for_is_what_the_holder_hears(count: int, first: int) -> None:
    keys = keys_of_prompt()[first : first + count]
    if keys:
        assert keys_of(subject_of(keys)) == keys


def test_hashes_without_their_tokens_are_refused() -> None:
    with pytest.raises(Refused, match="come with 0 tokens"):
        keys_of(Prefix((1, 2)))


# ---- the engine ----


def hold(engine: Engine, export_id: int, keys: tuple[BlockKey, ...]) -> tuple[int, ...]:
    """The blocks that a holder says it holds."""
    engine.outgoing.hold_prefix(export_id, keys)
    early = engine.take_early()
    assert early is not None
    return early.held[-1].blocks


def test_a_holder_gives_only_what_is_exactly_asked_for_and_at_most_a_quarter_of_its_pool() -> None:
    engine = make_engine()
    engine.add(1, PROMPT)
    run_to_end(engine)
    keys = keys_of_prompt()
    assert len(hold(engine, 7, keys)) == 4 == engine.num_held_blocks
    assert hold(engine, 8, keys) == ()
    engine.outgoing.release_prefix(7)
    engine.outgoing.release_prefix(7)
    engine.outgoing.release_prefix(8)
    assert engine.num_held_blocks == 0
    spoiled = (keys[0], replace(keys[1], token_ids=(0,) * BLOCK_SIZE), *keys[2:])
    assert len(hold(engine, 9, spoiled)) == 1
    engine.outgoing.release_prefix(9)


def test_a_cancelled_pull_keeps_its_blocks_until_the_writers_have_stopped() -> None:
    engine = make_engine()
    engine.add(1, PROMPT, Kind.SOURCE, PrefixHint(PEER, 6))
    (wanted,) = step_until(engine, "pulls").pulls
    assert (wanted.first_block, len(wanted.blocks), wanted.keys) == (0, 6, keys_of_prompt()[:6])
    engine.cancel(1)
    assert step_until(engine, "abandoned").abandoned == [1] and engine.num_held_blocks > 0
    engine.incoming.pulled(1, 6)
    assert engine.num_held_blocks == 0 and not engine.has_work


def test_only_what_arrived_is_used_and_published() -> None:
    donor, engine = make_engine(), make_engine()
    donor.add(1, PROMPT)
    run_to_end(donor)
    engine.add(1, PROMPT, Kind.LOCAL, PrefixHint(PEER, 6))
    (wanted,) = step_until(engine, "pulls").pulls
    held = hold(donor, 1, wanted.keys[:4])
    for ours, theirs in zip(wanted.blocks, held, strict=False):
        engine._runner.kv_memory.block(ours, 0, 2)[:] = donor._runner.kv_memory.block(theirs, 0, 2)
    engine.incoming.pulled(1, 4)
    engine.incoming.pulled(1, 6)
    outputs = run_to_end(engine)
    assert tokens_of(outputs, 1) == GOLDEN and outputs[0][1].cached_tokens == 4 * BLOCK_SIZE
    engine.add(2, PROMPT)
    assert tokens_of(run_to_end(engine), 2) == GOLDEN


def test_a_worker_does_not_ask_itself_nor_for_what_it_has() -> None:
    engine = make_engine()
    engine.add(1, PROMPT, Kind.LOCAL, PrefixHint(WorkerAddress("local", 1, "x"), 6))
    outputs = run_to_end(engine)
    engine.add(2, PROMPT, Kind.LOCAL, PrefixHint(PEER, 6))
    outputs += run_to_end(engine)
    assert tokens_of(outputs, 1) == tokens_of(outputs, 2) == GOLDEN


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_tokens_do_not_depend_on_what_a_peer_sends_when_or_whether(seed: int) -> None:
    """A donor answers late, in part, or not at all, from a pool under pressure; some requests are cancelled meanwhile."""
    rng = random.Random(seed)
    runner = fake_runner(12)
    donor = make_engine(fake_runner(12))
    engine = make_engine(runner, tiers=KvTiers(runner.kv_memory, rng.randint(0, 6)))
    requests = []
    for index in range(rng.randint(1, 8)):
        shared, length = rng.choice([64, 192, 320]), rng.randint(1, 400)
        family = rng.randint(0, 2)
        prompt = [(i + 300 * family if i < shared else 7 * i + index) % 990 + 5 for i in range(length)]
        requests.append(make_request(prompt, rng.randint(1, 20), seed=index))
    outputs, open_pulls, cancelled = [], [], set()
    pending = list(enumerate(requests))
    for _ in range(20_000):
        if pending and rng.random() < 0.5:
            index, request = pending.pop(0)
            if rng.random() < 0.5:
                donor.add(index, request)
                run_to_end(donor)
            engine.add(index, request, Kind.LOCAL, PrefixHint(PEER, rng.randint(0, 7)))
        result = engine.step()
        outputs += result.outputs
        open_pulls += result.pulls
        if open_pulls and rng.random() < 0.5:
            wanted = open_pulls.pop(rng.randint(0, len(open_pulls) - 1))
            blocks = hold(donor, wanted.sequence_id, wanted.keys)
            count = rng.randint(0, len(blocks))
            for ours, theirs in zip(wanted.blocks[wanted.first_block :], blocks[:count], strict=False):
                engine._runner.kv_memory.block(ours, 0, 2)[:] = donor._runner.kv_memory.block(theirs, 0, 2)
            donor.outgoing.release_prefix(wanted.sequence_id)
            if rng.randint(0, 4) == 0:
                cancelled.add(wanted.sequence_id)
                engine.cancel(wanted.sequence_id)
            engine.incoming.pulled(wanted.sequence_id, count)
        if not (pending or open_pulls or engine.has_work):
            break
    for index, request in enumerate(requests):
        if index not in cancelled:
            assert tokens_of(outputs, index) == generate_alone(request)
    assert engine.num_held_blocks == donor.num_held_blocks == 0


# ---- workers ----


@asynccontextmanager
async def trio(
    config: WorkerConfig = CONFIG,
) -> AsyncIterator[tuple[Attached, WorkerAddress, Worker, Attached, WorkerAddress]]:
    """A decode worker with its router, a prefill worker, and a holder with its router."""
    async with (
        running("prefill-0", Role.PREFILL, config) as (prefill, source),
        running("decode-0", Role.DECODE, config) as (_, address),
        running("holder-0", Role.MIXED, config) as (_, holder),
    ):
        router, warmer = await Attached(address).start(), await Attached(holder).start()
        try:
            yield router, source, prefill, warmer, holder
        finally:
            await router.close()
            await warmer.close()


async def ask(router: Attached, source: WorkerAddress | None, hint: PrefixHint, request_id: str = "r") -> list:  # type: ignore[type-arg]
    prefill = (source,) if source is not None else ()
    request = replace(PROMPT, request_id=request_id)
    await router.send(Submit(request, router.address.generation, prefill, prefix=hint))
    return await router.finish(request_id)


async def idle(worker: Worker) -> dict[str, float]:
    async with asyncio.timeout(20):
        while not holds_nothing(worker.status()):
            await asyncio.sleep(0.01)
    return dict(worker.status().counters)


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_a_prefill_worker_takes_the_beginning_from_a_peer_and_computes_the_rest(transport: str) -> None:
    async with trio(replace(CONFIG, transports=(transport,))) as (router, source, prefill, warmer, holder):
        await warmer.submit(SHORTER)
        await warmer.finish("warm")
        outputs = await ask(router, source, PrefixHint(holder, 5))
        assert tokens(outputs) == GOLDEN
        counters = await idle(prefill)
        assert counters["prefix_pulled_blocks"] == 5 and counters["prefill_tokens"] == 3 * BLOCK_SIZE + 9
        assert dict((await warmer.idle()).counters)["prefix_exported_blocks"] == 5
        assert tokens(await ask(router, source, PrefixHint(holder, 5), "again")) == GOLDEN


async def test_a_mixed_worker_pulls_for_its_own_prompts() -> None:
    async with running("m-0", Role.MIXED) as (_, holder), running("m-1", Role.MIXED) as (worker, address):
        warmer, router = await Attached(holder).start(), await Attached(address).start()
        await warmer.submit(SHORTER)
        await warmer.finish("warm")
        assert tokens(await ask(router, None, PrefixHint(holder, 5))) == GOLDEN
        assert (await idle(worker))["prefix_pulled_blocks"] == 5
        await router.close()
        await warmer.close()


async def test_a_stale_hint_costs_a_question_and_no_token() -> None:
    async with trio() as (router, source, prefill, warmer, holder):
        await warmer.submit(SHORTER)
        await warmer.finish("warm")
        outputs = await ask(router, source, PrefixHint(holder, 8), "more")
        assert tokens(outputs) == GOLDEN, "it holds fewer blocks than the router believes"
        assert (await idle(prefill))["prefix_pulled_blocks"] == 5


@pytest.mark.parametrize("stale", ["empty", "generation", "dead"])
async def test_a_peer_that_has_nothing_or_is_gone_is_done_without(stale: str) -> None:
    async with trio() as (router, source, prefill, _, holder):
        hint = {
            "empty": PrefixHint(holder, 8),
            "generation": PrefixHint(replace(holder, generation=holder.generation - 1), 8),
            "dead": PrefixHint(PEER, 8),
        }[stale]
        outputs = await ask(router, source, hint)
        assert tokens(outputs) == GOLDEN and outputs[0].handoff.prefill_worker == "prefill-0"
        counters = await idle(prefill)
        assert counters["prefix_pulls_empty" if stale == "empty" else "prefix_pulls_failed"] == 1
        assert counters.get("prefix_pulled_blocks", 0) == 0


async def test_a_slow_peer_is_not_asked_again_soon() -> None:
    async with trio() as (router, source, prefill, _, _):
        for name in ("a", "b"):
            request = make_request([ord(name)] * 600, 4, request_id=name)
            await router.send(Submit(request, router.address.generation, (source,), prefix=PrefixHint(PEER, 8)))
            assert tokens(await router.finish(name)) == generate_alone(request)
        counters = await idle(prefill)
        assert counters["prefix_pulls"] == 1 and counters["prefix_pulls_not_worth_it"] == 1


async def test_a_request_may_be_cancelled_in_mid_pull() -> None:
    async with trio() as (router, source, prefill, warmer, holder):
        await warmer.submit(SHORTER)
        await warmer.finish("warm")
        for index in range(20):
            name = f"c{index}"
            request = replace(PROMPT, request_id=name, prompt_token_ids=(*PROMPT.prompt_token_ids, index))
            await router.send(Submit(request, router.address.generation, (source,), prefix=PrefixHint(holder, 5)))
            for _ in range(index):
                await asyncio.sleep(0)
            await router.send(Cancel(name))
        await idle(prefill)
        await router.idle()
        await warmer.idle()
        assert tokens(await ask(router, source, PrefixHint(holder, 5))) == GOLDEN


async def test_a_holder_serves_so_many_at_once_and_refuses_politely(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_EXPORTS > 0
    monkeypatch.setattr("workers.prefix_export.MAX_EXPORTS", 0)
    async with trio() as (router, source, prefill, warmer, holder):
        await warmer.submit(SHORTER)
        await warmer.finish("warm")
        assert tokens(await ask(router, source, PrefixHint(holder, 5))) == GOLDEN
        assert (await idle(prefill))["prefix_pulls_failed"] == 1
        assert dict((await warmer.idle()).counters)["prefix_exports_refused"] == 1


HOLDER = """
import asyncio, sys
from builders import FakeModel
from test_worker import CONFIG
from dataclasses import replace
from workers.status import Role
from workers.worker import Worker

async def main():
    config = replace(CONFIG, transports=("grpc",), transfer_window_bytes=1 << 20)
    worker = Worker(config, "holder-0", 1, Role.MIXED, load=FakeModel)
    address = await worker.start()
    print(address.generation, address.target, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_holder_that_is_killed_in_mid_pull_costs_no_token() -> None:
    tests = Path(__file__).resolve().parent
    paths = os.pathsep.join(str(p) for p in (tests, tests.parent, tests.parent.parent))
    config = replace(CONFIG, transports=("grpc",))
    async with (
        running("prefill-0", Role.PREFILL, config) as (prefill, source),
        running("decode-0", Role.DECODE, config) as (_, address),
    ):
        router = await Attached(address).start()
        for index in range(3):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", HOLDER, env={**os.environ, "PYTHONPATH": paths}, stdout=asyncio.subprocess.PIPE
            )
            try:
                assert process.stdout is not None
                async with asyncio.timeout(60):
                    generation, target = (await process.stdout.readline()).split()
                holder = WorkerAddress(f"holder-{index}", int(generation), target.decode())
                warmer = await Attached(holder).start()
                request = replace(
                    PROMPT, request_id=f"k{index}", prompt_token_ids=(90 + index, *PROMPT.prompt_token_ids)
                )
                await warmer.submit(replace(request, request_id="warm"))
                await warmer.finish("warm")
                await warmer.close()
                # A stopped process answers nothing: the pull is surely under way when it is killed.
                process.send_signal(signal.SIGSTOP)
                await router.send(Submit(request, router.address.generation, (source,), prefix=PrefixHint(holder, 8)))
                async with asyncio.timeout(20):
                    while dict(prefill.status().counters).get("prefix_pulls", 0) <= index:
                        await asyncio.sleep(0.005)
                process.kill()
                assert tokens(await router.finish(f"k{index}")) == generate_alone(request)
            finally:
                if process.returncode is None:
                    process.kill()
                await process.wait()
        counters = await idle(prefill)
        assert counters["prefix_pulls_failed"] == 3 and counters.get("prefix_pulled_blocks", 0) == 0
        await router.close()
