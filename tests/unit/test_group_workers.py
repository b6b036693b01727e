"""Workers of several ranks, whole: they hand KV to workers of other layouts, and survive the loss of a rank."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
from builders import make_request
from model_configs import SHIPPED
from rank_processes import TOKEN, RankPool, RankProcess
from running_workers import Attached, tokens

from workers.config import ParallelConfig, WorkerConfig
from workers.errors import InvalidConfig, Refusal
from workers.group.watch import GroupPlan
from workers.group_worker import GroupWorker
from workers.request import FinishReason
from workers.runner import BLOCK_SIZE
from workers.status import RankStatus, Role, WorkerAddress
from workers.worker import Worker

pytestmark = pytest.mark.timeout(180)
BOUND_S = 60.0
PROMPT = [300 + (7 * at) % 900 for at in range(150)]
ALONE = WorkerConfig(
    model=str(SHIPPED),
    max_model_len=512,
    kv_memory_bytes=20_000_000,
    local_prefill_tokens=0,
    transfer_timeout_s=20.0,
)
EP2 = replace(ALONE, parallel=ParallelConfig(expert_parallel=2, heartbeat_timeout_s=20.0))
"""Attention is data-parallel: two pools."""
TP2 = replace(ALONE, parallel=ParallelConfig(expert_parallel=2, tensor_parallel=2, heartbeat_timeout_s=20.0))
"""One pool, each rank with half of its heads."""


@pytest.fixture(scope="module")
def processes() -> Iterator[RankPool]:
    """Processes for ranks, which outlive the groups that use them: each takes seconds to start."""
    pool = RankPool()
    yield pool
    pool.close()


@dataclass
class Ranks:
    """The other ranks of one worker, as a supervisor starts and replaces them."""

    pool: RankPool
    config: WorkerConfig
    processes: dict[int, RankProcess] = field(default_factory=dict)
    lost: list[RankStatus] = field(default_factory=list)
    address: tuple[str, int] = ("", 0)

    def plan(self) -> GroupPlan:
        return GroupPlan("127.0.0.1", TOKEN, self._listening, self._on_lost)

    def start(self, rank: int) -> None:
        self.processes[rank] = self.pool.take()
        self.processes[rank].pipe.send((self.config, rank, [self.address]))

    def _listening(self, address: tuple[str, int]) -> None:
        self.address = address
        for rank in range(1, self.config.parallel.size):
            self.start(rank)

    def _on_lost(self, rank: RankStatus, reason: str) -> None:
        self.lost.append(rank)
        self.processes[rank.rank].process.kill()
        self.start(rank.rank)

    def end(self) -> None:
        """After the worker's stop, which ends the ranks' service."""
        for process in self.processes.values():
            process.outcome()
            self.pool.give_back(process)


@asynccontextmanager
async def running(
    name: str, role: Role, config: WorkerConfig, processes: RankPool
) -> AsyncIterator[tuple[Worker, WorkerAddress, Ranks]]:
    ranks = Ranks(processes, config)
    worker = (
        Worker(config, name, 1, role)
        if config.parallel.size == 1
        else GroupWorker(config, name, 1, role, plan=ranks.plan())
    )
    try:
        yield worker, await asyncio.wait_for(worker.start(), BOUND_S), ranks
    finally:
        await worker.stop()
        ranks.end()


def kv_of(worker: Worker) -> set[bytes]:
    """The content of every block that the worker's memory holds."""
    memory = worker._memory
    assert memory is not None
    blocks = (memory.block(at, 0, memory.layout.num_layers) for at in range(memory.layout.num_blocks))
    return {block.tobytes() for block in blocks if block.any()}


ONE_MEMORY, OWN_MEMORIES = ("shm", "grpc"), ("grpc",)


@pytest.mark.parametrize(
    ("prefill", "decode", "transports", "native"),
    [
        (EP2, TP2, ONE_MEMORY, True),
        (EP2, TP2, OWN_MEMORIES, True),
        (TP2, ALONE, OWN_MEMORIES, True),
        (ALONE, EP2, ONE_MEMORY, True),
        (ALONE, TP2, ONE_MEMORY, False),
    ],
    ids=["dp2-to-tp2", "dp2-to-tp2-own-memories", "tp2-to-one-own-memories", "one-to-ep2", "one-to-tp2-pytorch"],
)
async def test_kv_goes_from_one_layout_to_another_bit_by_bit(
    prefill: WorkerConfig, decode: WorkerConfig, transports: tuple[str, ...], native: bool, processes: RankPool
) -> None:
    """Without shm every rank keeps its KV to itself, as on another host, and blocks are cut and joined by head."""
    prefill, decode = (replace(config, transports=transports, native=native) for config in (prefill, decode))
    async with (
        running("prefill-0", Role.PREFILL, prefill, processes) as (giver, source, _),
        running("decode-0", Role.DECODE, decode, processes) as (taker, address, _),
    ):
        router = await Attached(address).start()
        assert giver.status().model.fingerprint == taker.status().model.fingerprint
        await router.submit(make_request(PROMPT, max_tokens=6, request_id="a", ignore_eos=True), source)
        outputs = await router.finish("a")
        report = outputs[0].handoff
        assert report is not None and (report.prefill_worker, report.transport) == ("prefill-0", transports[0])
        assert len(tokens(outputs)) == 6
        full = len(PROMPT) // BLOCK_SIZE
        assert len(kv_of(giver) & kv_of(taker)) >= full, "each full block of the prompt is in both memories"
        # decoding read what came: a prompt of the same tokens is found in the cache, where it was computed nowhere
        await router.submit(make_request([*PROMPT[: full * BLOCK_SIZE], 5], max_tokens=1, request_id="b"))
        assert (await router.finish("b"))[0].cached_tokens == full * BLOCK_SIZE
        await router.close()


async def test_a_lost_rank_gives_requests_back_and_the_worker_returns_in_a_new_generation(
    processes: RankPool,
) -> None:
    async with running("decode-0", Role.MIXED, EP2, processes) as (worker, address, ranks):
        router = await Attached(address).start()
        await router.submit(make_request(PROMPT, max_tokens=300, request_id="a", ignore_eos=True))
        await router.until(lambda: len(router.outputs) > 5)
        [victim] = [rank for rank in worker.status().ranks if rank.rank == 1]
        os.kill(victim.pid, signal.SIGKILL)
        given_back = await router.finish("a")
        assert given_back[-1].refusal is Refusal.WORKER_LOST
        assert worker.status().is_rebuilding and worker.status().generation == address.generation + 1

        await router.submit(make_request([5], request_id="early"), generation=address.generation + 1)
        assert (await router.finish("early"))[-1].refusal is Refusal.SHUTTING_DOWN

        await asyncio.wait_for(router.until(lambda: bool(router.status and router.status.generation & 1)), BOUND_S)
        while router.status is None or router.status.is_rebuilding:
            await router.until(lambda: router.status is not None and not router.status.is_rebuilding)
        delivered = tokens(given_back)
        again = make_request(PROMPT, max_tokens=40, request_id="b", ignore_eos=True, replay=delivered[:5])
        await router.submit(again, generation=address.generation + 1)
        outputs = await router.finish("b")
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        same = min(len(delivered) - 5, 35)
        assert tokens(outputs)[:same] == delivered[5 : 5 + same], (
            "what was not delivered before is what would have come"
        )
        assert outputs[0].cached_tokens == 0, "the prefix cache began anew"
        now = {rank.rank: rank for rank in worker.status().ranks}
        assert [rank.pid for rank in ranks.lost] == [victim.pid]
        assert now[1].is_alive and now[1].pid != victim.pid and now[1].epoch == 2
        assert dict(worker.status().counters)["rebuilds"] == 1
        await router.close()


async def test_all_ranks_of_a_group_take_a_new_role_at_one_step(processes: RankPool) -> None:
    async with running("decode-0", Role.DECODE, EP2, processes) as (worker, address, _):
        assert worker.set_role(Role.PREFILL).generation == address.generation + 1
        assert isinstance(worker, GroupWorker)
        await asyncio.wait_for(worker.switched(), BOUND_S)
        assert worker.group.member.role == "prefill"
        answers = worker.group.last_done
        assert {done.generation for done in answers.values()} == {address.generation + 1}
        assert len({done.number for done in answers.values()}) == 1


async def test_a_worker_of_several_ranks_without_a_cluster_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="start a group"):
        await Worker(EP2, "decode-0", 1, Role.MIXED).start()
