"""Workers fetch the beginning of a prompt from a peer that has it; whatever goes wrong, they compute it instead."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from builders import IMPORT_PATHS, generate_alone, make_request
from running_workers import CONFIG, Attached, idle, running, tokens

from workers.config import WorkerConfig
from workers.runner import BLOCK_SIZE
from workers.serving.exports import MAX_PREFIXES
from workers.status import PrefixHint, Role, WorkerAddress
from workers.wire.attach import Cancel, Submit
from workers.worker import Worker

PROMPT = make_request(range(5, 5 + 8 * BLOCK_SIZE + 9), 16, request_id="r")


GOLDEN = generate_alone(PROMPT)


SHORTER = make_request(PROMPT.prompt_token_ids[: 5 * BLOCK_SIZE + 1], 1, request_id="warm")
"""Leaves 5 blocks of PROMPT in a pool."""


PEER = WorkerAddress("peer", 1 << 32, "127.0.0.1:1")


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
    assert MAX_PREFIXES > 0
    monkeypatch.setattr("workers.serving.exports.MAX_PREFIXES", 0)
    async with trio() as (router, source, prefill, warmer, holder):
        await warmer.submit(SHORTER)
        await warmer.finish("warm")
        assert tokens(await ask(router, source, PrefixHint(holder, 5))) == GOLDEN
        assert (await idle(prefill))["prefix_pulls_failed"] == 1
        assert dict((await warmer.idle()).counters)["prefix_exports_refused"] == 1


HOLDER = """
import asyncio, sys
from builders import FakeModel
from running_workers import CONFIG
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
    config = replace(CONFIG, transports=("grpc",))
    async with (
        running("prefill-0", Role.PREFILL, config) as (prefill, source),
        running("decode-0", Role.DECODE, config) as (_, address),
    ):
        router = await Attached(address).start()
        for index in range(3):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                HOLDER,
                env={**os.environ, "PYTHONPATH": IMPORT_PATHS},
                stdout=asyncio.subprocess.PIPE,
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
