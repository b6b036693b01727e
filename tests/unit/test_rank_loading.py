"""A rank reads its own share of a checkpoint and nothing else, and holds little more than that while it loads."""

from __future__ import annotations

import multiprocessing as mp
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.model_configs import moe_with_shared_experts
from workers.config import ParallelConfig, WorkerConfig
from workers.errors import InvalidConfig
from workers.model.collectives import Links
from workers.model.ernie_config import ErnieConfig
from workers.model.parallel import Layout
from workers.model.rank_runner import initial_placement, load_rank, share_bytes
from workers.model.weights import Checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 230 MB in fp32, most of it experts."""
    return moe_with_shared_experts(
        tmp_path_factory.mktemp("wide"), hidden_size=512, moe_intermediate_size=512, moe_num_experts=16,
        num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4, head_dim=64, intermediate_size=1024,
        vocab_size=4000,
    ).folder  # fmt: skip


def config(folder: Path, **parallel: Any) -> WorkerConfig:
    return WorkerConfig(
        model=str(folder), max_model_len=64, kv_memory_bytes=1 << 20, native=False, parallel=ParallelConfig(**parallel)
    )


def load_and_measure(folder: str, parallel: dict[str, int], answer: Any) -> None:
    """In a process of its own: (how far RSS rose at its highest, bytes of the share)."""
    from workers.model.layers import Linear

    torch.set_num_threads(1)
    settings = config(Path(folder), **parallel)
    dimensions = ErnieConfig.load(Path(folder))
    Linear(torch.zeros(256, 256))(torch.zeros(300, 256))  # what libraries allocate once
    before = rss("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    placement = initial_placement(settings, dimensions)
    rank = settings.parallel.size - 1
    runner = load_rank(settings, rank, Links(), placement)
    share = share_bytes(dimensions, Layout.of(settings.parallel, dimensions, rank), placement, torch.float32)
    answer.put((rss("VmHWM") - before - runner.kv_memory.layout.pool_bytes, share))


def rss(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(folder: Path, parallel: dict[str, int]) -> tuple[int, int]:
    context = mp.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=load_and_measure, args=(str(folder), parallel, answer))
    process.start()
    grown, share = answer.get()
    process.join()
    return grown, share


def test_loading_takes_less_than_a_fifth_more_than_the_share(folder: Path) -> None:
    """Between two shares, so that what libraries take whatever the model is (some 40 MB) does not count."""
    whole_grown, whole = measure(folder, {})
    part_grown, part = measure(folder, {"expert_parallel": 4, "tensor_parallel": 4})
    assert part < 0.5 * whole
    assert whole_grown - part_grown < 1.2 * (whole - part)
    assert part_grown < 1.2 * part + (80 << 20)


def test_a_share_is_the_slice_of_the_whole_in_both_dimensions(folder: Path) -> None:
    name, shape = "model.layers.0.mlp.down_proj.weight", (512, 1024)
    whole = Checkpoint(folder).take(name, shape, torch.float32)
    checkpoint = Checkpoint(folder)
    assert torch.equal(checkpoint.take_share(name, shape, torch.float32, 0, 128, 64), whole[128:192])
    assert torch.equal(checkpoint.take_share(name, shape, torch.bfloat16, 1, 256, 512), whole[:, 256:768].bfloat16())
    with pytest.raises(InvalidConfig, match="calls for"):
        checkpoint.take_share(name, (512, 1023), torch.float32, 1, 0, 10)


def test_an_expert_that_no_file_holds_is_missed_by_every_rank(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (source,) = folder.glob("*.safetensors")
    tensors = load_file(source)
    del tensors["model.layers.2.mlp.experts.15.up_proj.weight"]
    save_file(tensors, tmp_path / source.name)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    settings = config(tmp_path, expert_parallel=2)
    with pytest.raises(InvalidConfig, match=r"experts\.15\.up_proj"):
        load_rank(settings, 0, Links(), initial_placement(settings, ErnieConfig.load(tmp_path)))
