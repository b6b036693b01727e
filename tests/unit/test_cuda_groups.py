"""Groups of ranks on the CUDA path: the greedy tokens of one rank on the CPU, whatever the layout and wherever experts are.

Without a GPU the kernels run in Triton's interpreter and the ranks talk over Gloo, so models and prompts are tiny.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import make_engine, make_request, run_to_end, tokens_of
from tests.unit.model_configs import load, random_tokens
from tests.unit.rank_processes import KILL, Group, RankPool
from tests.unit.test_cuda_runner import DEVICE, MAX_LEN, load_cuda, tiny_dense, tiny_moe
from tests.unit.test_engine import hand_over
from tests.unit.test_group_ranks import Found, found, in_mid_run, only_tokens
from workers.config import ParallelConfig, WorkerConfig
from workers.engine.engine import Engine
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.cuda.rank_runner import CudaRankRunner, CudaRanks
from workers.model.decoder.rank import initial_placement
from workers.model.parallel.collectives import Links
from workers.request import Output, Request
from workers.runner import Runner

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # of rows that nobody reads
]

SKEWED = [[90, 40, 1, 60]]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    torch.set_num_threads(1)
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("checkpoints")
    tiny_moe(made / "moe")
    tiny_dense(made / "dense", num_key_value_heads=2)
    return {name: made / name for name in ("moe", "dense")}


def config(folder: Path, transports: tuple[str, ...] = ("shm", "tcp"), **parallel: Any) -> WorkerConfig:
    return WorkerConfig(
        model=str(folder), device="cuda", max_model_len=MAX_LEN, kv_memory_bytes=1 << 20, max_num_seqs=4,
        max_batch_tokens=96, transports=transports, parallel=ParallelConfig(**{"heartbeat_timeout_s": 60.0, **parallel}),
    )  # fmt: skip


def requests(count: int = 3) -> list[Request]:
    return [
        make_request(random_tokens(5 + 4 * i, i, 64), 4, request_id=str(i), ignore_eos=True, logprobs=1)
        for i in range(count)
    ]


def start(runner: Runner, work: list[Request]) -> Engine:
    """A budget that cuts prompts into chunks, so that prompts and decode meet in one step."""
    engine = make_engine(runner, max_batch_tokens=10, max_model_len=MAX_LEN)
    for i, request in enumerate(work):
        engine.add(i, request)
    return engine


def alone(folder: Path, work: list[Request]) -> list[list[int]]:
    runner = load(folder, max_model_len=MAX_LEN, native=False)
    return only_tokens(found(run_to_end(start(runner, work)), len(work)))


def generate(group: Group, work: list[Request], move_after: int = 0) -> Found:
    """With experts that move from rank to rank after some steps."""
    engine = start(group.runner, work)
    outputs: list[tuple[int, Output]] = []
    for _ in range(move_after):
        outputs += engine.step().outputs
    if move_after:
        assert group.runner.rebalance(SKEWED) == 1
    outputs += run_to_end(engine)
    assert engine.num_held_blocks == 0
    return found(outputs, len(work))


LAYOUTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("moe", {"expert_parallel": 2, "redundant_experts": 2, "min_overlap_tokens": 1}),
    ("moe", {"expert_parallel": 2, "tensor_parallel": 2, "dispatch": "all_to_all"}),
    ("dense", {"tensor_parallel": 2}),
)


@pytest.mark.parametrize(("model", "parallel"), LAYOUTS)
def test_a_group_gives_the_greedy_tokens_of_one_rank_on_the_cpu(
    pool: RankPool, folders: dict[str, Path], model: str, parallel: dict[str, Any]
) -> None:
    work = requests()
    group = Group(pool, config(folders[model], **parallel))
    try:
        before = group.runner.placement
        result = generate(group, work, move_after=3 if model == "moe" else 0)
        assert only_tokens(result) == alone(folders[model], work)
        if "tensor_parallel" not in parallel:  # then no sum is cut, and the logprobs too are those of one such rank
            assert result == found(run_to_end(start(load_cuda(folders[model]), work)), len(work))
        assert (group.runner.placement != before) == (model == "moe")
    finally:
        group.stop()


def test_warming_up_touches_no_block_and_talks_to_nobody(folders: dict[str, Path]) -> None:
    settings = config(folders["moe"], expert_parallel=2, tensor_parallel=2)
    placement = initial_placement(settings, ErnieConfig.load(folders["moe"]))
    rank = CudaRanks(DEVICE).load(settings, 1, Links(), placement, num_blocks=4)
    rank.warm_up()
    assert not rank._pool.values[:-1].any() and rank._pool.values[-1].any()
    assert rank.experts.take_load() == [[0, 0, 0, 0]]


def test_rows_travel_without_the_host_until_a_rank_is_lost_and_with_it_from_then_on(
    pool: RankPool, folders: dict[str, Path]
) -> None:
    work = requests()
    golden = alone(folders["moe"], work)
    group = Group(pool, config(folders["moe"], expert_parallel=2, redundant_experts=2, dispatch="device"))
    own = group.runner.member.runner
    assert isinstance(own, CudaRankRunner)
    try:
        assert own.is_direct and group.runner.rebalance(SKEWED) == 1
        result = in_mid_run(group, work, lambda: group.ranks[1].signal(KILL), num_steps=3)
        assert only_tokens(result) == golden
        assert not own.is_direct and group.runner.epoch == 2
    finally:
        group.stop()


@pytest.mark.parametrize(
    ("transports", "parallel"),
    [
        (("shm", "tcp"), {"expert_parallel": 2, "tensor_parallel": 2, "dispatch": "all_to_all"}),
        (("tcp",), {"expert_parallel": 2, "dispatch": "all_to_all"}),
    ],
)
def test_kv_goes_from_a_group_to_one_rank_and_back(
    pool: RankPool, folders: dict[str, Path], transports: tuple[str, ...], parallel: dict[str, Any]
) -> None:
    """By way of the leader's memory, where ranks that cannot map it send their blocks; the second pool's too."""
    first, second = requests(2)
    golden = alone(folders["moe"], [first, second])
    group = Group(pool, config(folders["moe"], transports, **parallel))
    single = load_cuda(folders["moe"])
    try:
        assert group.runner.model_info.fingerprint == single.model_info.fingerprint
        for at, (source, target) in enumerate(((group.runner, single), (single, group.runner))):
            engines = [make_engine(runner, max_model_len=MAX_LEN) for runner in (source, target)]
            engines[at].add(9, second)  # takes the group's first pool
            engines[at].step()
            hand_over(source, engines[0], target, engines[1], first)
            assert tokens_of(run_to_end(engines[1]), 1) == golden[0]
    finally:
        group.stop()
