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
from tests.unit.test_cuda_runner import MAX_LEN, load_cuda, tiny_dense, tiny_moe
from tests.unit.test_engine import hand_over
from workers.config import ParallelConfig, WorkerConfig
from workers.engine import Engine
from workers.request import Output, Request
from workers.runner import Runner

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")

SKEWED = [[1, 90, 1, 40]]


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
        max_batch_tokens=24, transports=transports, parallel=ParallelConfig(**{"heartbeat_timeout_s": 60.0, **parallel}),
    )  # fmt: skip


def requests(count: int = 3) -> list[Request]:
    return [make_request(random_tokens(7 + 4 * i, i, 64), 5, request_id=str(i), ignore_eos=True) for i in range(count)]


def start(runner: Runner, work: list[Request]) -> Engine:
    """A budget that cuts prompts into chunks, so that prompts and decode meet in one step."""
    engine = make_engine(runner, max_batch_tokens=10, max_model_len=MAX_LEN)
    for i, request in enumerate(work):
        engine.add(i, request)
    return engine


def alone(folder: Path, work: list[Request]) -> list[list[int]]:
    outputs = run_to_end(start(load(folder, max_model_len=MAX_LEN, native=False), work))
    return [tokens_of(outputs, i) for i in range(len(work))]


def generate(group: Group, work: list[Request], move_after: int = 0) -> list[list[int]]:
    """With experts that move from rank to rank after some steps."""
    engine = start(group.runner, work)
    outputs: list[tuple[int, Output]] = []
    for _ in range(move_after):
        outputs += engine.step().outputs
    if move_after:
        assert group.runner.rebalance(SKEWED) == 1
    outputs += run_to_end(engine)
    assert engine.num_held_blocks == 0
    return [tokens_of(outputs, i) for i in range(len(work))]


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ("moe", {"expert_parallel": 2, "redundant_experts": 2, "min_overlap_tokens": 1}),
        ("moe", {"expert_parallel": 2, "tensor_parallel": 2, "exact_combine": False}),
        ("moe", {"expert_parallel": 2, "redundant_experts": 2, "dispatch": "device"}),
        ("dense", {"tensor_parallel": 2}),
    ],
)
def test_a_group_gives_the_greedy_tokens_of_one_rank_on_the_cpu(
    pool: RankPool, folders: dict[str, Path], model: str, parallel: dict[str, Any]
) -> None:
    work = requests()
    group = Group(pool, config(folders[model], **parallel))
    try:
        before = group.runner.placement
        found = generate(group, work, move_after=3 if model == "moe" else 0)
        assert found == alone(folders[model], work)
        assert (group.runner.placement != before) == (model == "moe")
    finally:
        group.stop()
