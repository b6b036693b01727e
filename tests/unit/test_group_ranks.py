"""Ranks in processes of their own, over Gloo: the tokens and bits of one rank, whatever happens to the group."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running_workers import Attached

from tests.builders import make_engine, make_request, run_to_end, tokens_of
from tests.unit.model_configs import (
    SHIPPED,
    moe_with_shared_experts,
    moe_without_shared_experts,
    random_tokens,
    small_dense,
)
from tests.unit.rank_processes import HANG, KILL, TOKEN, WAIT_S, Group, RankPool
from workers.config import ParallelConfig, WorkerConfig
from workers.engine.engine import Engine
from workers.errors import InvalidConfig
from workers.group.follower import Follower
from workers.group.messages import GetBlocks, PutBlocks
from workers.group.runner import GroupRunner
from workers.group.watch import GroupPlan
from workers.group_worker import GroupWorker
from workers.model.cpu.rank_runner import RankRunner
from workers.model.cpu.runner import TorchRunner
from workers.model.decoder.ernie import Ernie
from workers.model.loading import load_runner
from workers.model.native.rank import NativeRank
from workers.model.parallel.expert_placement import imbalance
from workers.request import Output, Request
from workers.runner import Runner
from workers.status import Role

Found = list[tuple[list[int], list[Any]]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped model and random ones whose heads and experts four ranks can share; the C++ kernels compute them all."""
    made = tmp_path_factory.mktemp("checkpoints")
    shared, routed, dense = (made / name for name in ("shared", "routed", "dense"))
    moe_with_shared_experts(shared, num_attention_heads=8, num_key_value_heads=4)
    moe_without_shared_experts(routed, num_key_value_heads=2)
    small_dense(dense, hidden_size=96, num_attention_heads=4, head_dim=32)
    return {"shipped": SHIPPED, "shared": shared, "routed": routed, "dense": dense}


def config(folder: Path, dtype: str = "float32", native: bool = True, **parallel: Any) -> WorkerConfig:
    return WorkerConfig(
        model=str(folder), dtype=dtype, max_model_len=512, kv_memory_bytes=24 << 20, native=native,
        parallel=ParallelConfig(**{"heartbeat_timeout_s": 20.0, **parallel}),
    )  # fmt: skip


def requests(count: int = 5, max_tokens: int = 12, **changes: Any) -> list[Request]:
    """Greedy and sampled ones, some with penalties, some with logprobs: what a rank must know to draw alike."""
    kinds: tuple[dict[str, Any], ...] = (
        {}, {"temperature": 0.9, "seed": 4}, {"logprobs": 3}, {"repetition_penalty": 1.3, "bad_words": ((7,),)},
        {"temperature": 0.7, "top_p": 0.8, "prompt_logprobs": 2},
    )  # fmt: skip
    return [
        make_request(
            random_tokens(20 + 23 * i, i, 480), max_tokens, request_id=str(i), ignore_eos=True,
            **{**kinds[i % len(kinds)], **changes},
        )
        for i in range(count)
    ]  # fmt: skip


def start(runner: Runner, work: list[Request]) -> Engine:
    engine = make_engine(runner, max_batch_tokens=96, max_model_len=512)
    for i, request in enumerate(work):
        engine.add(i, request)
    return engine


def found(outputs: list[tuple[int, Output]], count: int) -> Found:
    """Tokens of each request, and the logprobs that came with them: floats, so their bits count."""
    return [
        (
            tokens_of(outputs, i),
            [
                *(score for owner, o in outputs if owner == i for part in o.prompt_logprobs for score in part),
                *(o.logprobs for owner, o in outputs if owner == i and o.token_ids),
            ],
        )
        for i in range(count)
    ]


def generate(runner: Runner, work: list[Request]) -> Found:
    engine = start(runner, work)
    outputs = run_to_end(engine)
    assert engine.num_held_blocks == 0
    return found(outputs, len(work))


def alone(folder: Path, work: list[Request], dtype: str = "float32", native: bool = True) -> Found:
    return generate(TorchRunner.load(replace(config(folder, dtype, native), parallel=ParallelConfig())), work)


def only_tokens(result: Found) -> list[list[int]]:
    return [tokens for tokens, _ in result]


@pytest.mark.parametrize(
    ("model", "dtype", "native", "parallel"),
    [
        ("shipped", "float32", True, {"expert_parallel": 2}),
        ("shipped", "bfloat16", True, {"expert_parallel": 4}),
        ("shared", "float32", True, {"expert_parallel": 4, "redundant_experts": 3, "min_overlap_tokens": 1}),
        ("shared", "bfloat16", True, {"expert_parallel": 2, "redundant_experts": 1, "min_overlap_tokens": 1}),
        ("routed", "bfloat16", True, {"expert_parallel": 2, "redundant_experts": 2}),
        ("shared", "float32", False, {"expert_parallel": 2, "redundant_experts": 1}),
    ],
)
def test_experts_over_ranks_with_sequences_of_their_own_give_the_bits_of_one_rank(
    pool: RankPool, folders: dict[str, Path], model: str, dtype: str, native: bool, parallel: dict[str, int]
) -> None:
    work = requests()
    group = Group(pool, config(folders[model], dtype, native, **parallel))
    try:
        assert isinstance(own_model(group), NativeRank if native else Ernie)
        assert generate(group.runner, work) == alone(folders[model], work, dtype, native)
    finally:
        group.stop()


def own_model(group: Group) -> object:
    runner = group.runner.member.runner
    assert isinstance(runner, RankRunner)
    return runner.model


@pytest.mark.parametrize(
    ("model", "native", "parallel"),
    [
        ("shipped", True, {"expert_parallel": 2, "tensor_parallel": 2}),
        ("shared", True, {"expert_parallel": 4, "tensor_parallel": 4, "redundant_experts": 3}),
        ("routed", True, {"expert_parallel": 4, "tensor_parallel": 2}),
        ("dense", True, {"tensor_parallel": 2}),
        ("shipped", True, {"expert_parallel": 2, "exact_combine": False}),
        ("shipped", False, {"expert_parallel": 2, "tensor_parallel": 2}),
    ],
)
def test_heads_over_ranks_give_the_greedy_tokens_of_one_rank(
    pool: RankPool, folders: dict[str, Path], model: str, native: bool, parallel: dict[str, Any]
) -> None:
    work = requests(temperature=0.0)
    group = Group(pool, config(folders[model], native=native, **parallel))
    try:
        tokens = only_tokens(generate(group.runner, work))
        assert tokens == only_tokens(alone(folders[model], work, native=native))
        if model == "shipped":
            assert tokens == only_tokens(alone(folders[model], work, native=not native))
    finally:
        group.stop()


def in_mid_run(group: Group, work: list[Request], strike: Callable[[], None], num_steps: int = 8) -> Found:
    """Runs requests, strikes after some steps, and lets a supervisor replace what is lost while the engine goes on."""
    engine = start(group.runner, work)
    outputs: list[tuple[int, Output]] = []
    for _ in range(num_steps):
        outputs += engine.step().outputs
    num_lost = len(group.lost)
    strike()

    def supervise() -> None:
        for rank, _ in group.wait_lost(num_lost + 1)[num_lost:]:
            group.replace(rank)

    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    deadline = time.monotonic() + WAIT_S
    while engine.has_work and time.monotonic() < deadline:
        outputs += engine.step().outputs
    supervisor.join(WAIT_S)
    assert not engine.has_work, "the group did not recover"
    assert engine.num_held_blocks == 0
    return found(outputs, len(work))


def test_a_killed_and_a_hung_rank_are_replaced_without_a_changed_token_or_a_reload(pool: RankPool) -> None:
    settings = config(SHIPPED, expert_parallel=4, redundant_experts=0, heartbeat_timeout_s=4.0)
    work = requests(max_tokens=20)
    golden = only_tokens(alone(SHIPPED, work))
    group = Group(pool, settings)
    try:
        healthy = [group.ranks[rank].process.pid for rank in (1, 3)]
        assert only_tokens(in_mid_run(group, work, lambda: group.ranks[2].signal(KILL))) == golden
        assert group.lost[-1][0] == 2 and "connection" in group.lost[-1][1]
        assert only_tokens(in_mid_run(group, work, lambda: group.ranks[2].signal(HANG))) == golden
        assert group.lost[-1] == (2, "no sign of life for 4.0 s")
        assert group.runner.leader.epoch == 3 and len(group.lost) == 2
        assert [group.ranks[rank].process.pid for rank in (1, 3)] == healthy
    finally:
        group.stop()


@pytest.mark.parametrize(("dtype", "native"), [("float32", True), ("bfloat16", True), ("float32", False)])
def test_experts_move_between_ranks_while_tokens_flow_and_none_changes(
    pool: RankPool, dtype: str, native: bool
) -> None:
    settings = config(SHIPPED, dtype, native, expert_parallel=4, redundant_experts=4)
    work = requests(max_tokens=20)
    golden = alone(SHIPPED, work, dtype, native)
    group = Group(pool, settings)
    try:
        engine = start(group.runner, work)
        outputs: list[tuple[int, Output]] = []
        for _ in range(6):
            outputs += engine.step().outputs
        skewed = [[10, 10, 10, 30, 80, 80, 10, 10]] * 3
        before = group.runner.placement
        assert group.runner.rebalance(skewed) == 3
        outputs += run_to_end(engine)
        after = group.runner.placement
        for layer in range(3):
            assert imbalance(before.layers[layer], skewed[layer], 4) > 2.0
            assert imbalance(after.layers[layer], skewed[layer], 4) < 1.15
        assert found(outputs, len(work)) == golden
        if dtype == "bfloat16":
            return
        # a rank that comes now loads what the placement says, and the tokens stay
        assert only_tokens(in_mid_run(group, work, lambda: group.ranks[1].signal(KILL))) == only_tokens(golden)
        assert group.runner.placement == after
        load = group.runner.measure_load()
        assert len(load) == 3 and all(sum(layer) > 0 for layer in load)
    finally:
        group.stop()


def test_a_busy_group_looks_at_its_load_by_itself(pool: RankPool) -> None:
    settings = config(SHIPPED, expert_parallel=2, redundant_experts=2, rebalance_steps=4, rebalance_above=1.0)
    work = requests(max_tokens=16)
    group = Group(pool, settings)
    try:
        before = group.runner.placement
        assert generate(group.runner, work) == alone(SHIPPED, work)
        assert group.runner.placement != before
    finally:
        group.stop()


def test_all_ranks_take_a_role_at_one_step_boundary_and_a_replacement_takes_it_too(pool: RankPool) -> None:
    group = Group(pool, config(SHIPPED, expert_parallel=4))
    work = requests(max_tokens=10)
    golden = only_tokens(alone(SHIPPED, work))
    engine = start(group.runner, work)
    outputs: list[tuple[int, Output]] = []
    switched: list[int] = []
    try:
        switcher = threading.Thread(target=lambda: switched.append(group.runner.switch_role("decode", 65537)))
        for at in range(400):
            if not engine.has_work:
                break
            outputs += engine.step().outputs
            assert len({done.generation for done in group.runner.last_done.values()}) == 1
            if at == 4:
                switcher.start()
        switcher.join(WAIT_S)
        assert only_tokens(found(outputs, len(work))) == golden
        assert {done.generation for done in group.runner.last_done.values()} == {65537}
        assert switched[0] < group.runner.last_done[0].number
        group.ranks[3].signal(KILL)
        group.wait_lost()
        group.replace(3)
        group.wait_whole()
        assert only_tokens(generate(group.runner, work)) == golden
    finally:
        roles = group.stop()
    assert roles == dict.fromkeys((1, 2, 3), ("decode", 65537))


def test_a_rank_keeps_its_weights_for_the_leader_that_comes_next(pool: RankPool) -> None:
    settings = config(SHIPPED, expert_parallel=2)
    work = requests(3)
    process = pool.take()
    addresses: list[tuple[str, int]] = []
    golden = only_tokens(alone(SHIPPED, work))
    first = GroupRunner.load(settings, token="a group of tests", on_listening=addresses.append)
    second = GroupRunner.load(settings, token="a group of tests", on_listening=addresses.append)
    process.pipe.send((settings, 1, addresses))
    outcomes = []
    for runner in (first, second):
        assert runner.wait_serving(WAIT_S)
        assert only_tokens(generate(runner, work)) == golden
        runner.stop()
        outcomes.append(process.outcome())
    assert outcomes[0][2] == outcomes[1][2], "the rank loaded its weights again"
    pool.give_back(process)


async def test_a_group_has_the_face_of_one_worker_and_switches_as_one(pool: RankPool) -> None:
    settings = config(SHIPPED, expert_parallel=2)
    process = pool.take()
    plan = GroupPlan(
        "127.0.0.1",
        TOKEN,
        on_listening=lambda address: process.pipe.send((settings, 1, [address])),
        on_lost=lambda rank, reason: None,
    )
    worker = GroupWorker(settings, "group-0", 1, Role.MIXED, plan=plan)
    work = requests(2)
    router = None
    try:
        router = await Attached(await asyncio.wait_for(worker.start(), WAIT_S)).start()
        for request in work:
            await router.submit(request)
        tokens = [[t for o in await router.finish(r.request_id) for t in o.token_ids] for r in work]
        assert tokens == only_tokens(alone(SHIPPED, work))
        status = worker.set_role(Role.PREFILL)
        await worker.switched()
        member = worker.group.member
        assert (member.role, member.generation) == ("prefill", status.generation)
    finally:
        if router is not None:
            await router.close()
        await worker.stop()
    _, facts, _ = await asyncio.to_thread(process.outcome)
    assert facts == ("prefill", status.generation)
    pool.give_back(process)


def test_a_single_worker_does_not_start_a_group_by_mistake() -> None:
    with pytest.raises(InvalidConfig, match="start a group"):
        load_runner(config(SHIPPED, expert_parallel=2))


def test_a_rank_of_another_group_is_declined() -> None:
    settings = config(SHIPPED, expert_parallel=2)
    addresses: list[tuple[str, int]] = []
    runner = GroupRunner.load(settings, token="right", on_listening=addresses.append)
    try:
        assert "leads no group that this rank was started for" in Follower(settings, 1, "wrong").serve(*addresses[0])
        with pytest.raises(InvalidConfig, match="does not belong"):
            Follower(settings, 3, "right").serve(*addresses[0])
        with pytest.raises(InvalidConfig, match="it computes with torch, and the leader with native"):
            Follower(replace(settings, native=False), 1, "right").serve(*addresses[0])
        assert not runner.leader.is_serving
    finally:
        runner.stop()


def test_a_group_whose_step_hangs_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.group.runner.STOP_WAIT_S", 0.1)
    group = GroupRunner.load(config(SHIPPED, expert_parallel=2), token=TOKEN)
    with ThreadPoolExecutor(1) as threads, group._step_lock:  # as a step holds it
        threads.submit(group.stop).result(WAIT_S)
    assert not group.wait_serving(0.0)


def test_a_rank_leaves_blocks_alone_that_were_sent_in_an_epoch_that_is_over(pool: RankPool) -> None:
    group = Group(pool, replace(config(SHIPPED, expert_parallel=2), transports=("tcp",)))
    leader = group.runner.leader
    try:
        before = leader.ask(1, GetBlocks([0])).tail
        others = bytes(byte ^ 1 for byte in before)
        leader._channels[1].send(PutBlocks([0], leader.epoch - 1, tail=others))
        assert leader.ask(1, GetBlocks([0])).tail == before
        leader.ask(1, PutBlocks([0], tail=others))
        assert leader.ask(1, GetBlocks([0])).tail == others
    finally:
        group.stop()
