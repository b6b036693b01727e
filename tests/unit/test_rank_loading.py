"""A rank reads its own share of a checkpoint and nothing else, and holds little more than that while it loads."""

from __future__ import annotations

import multiprocessing as mp
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.model_configs import moe_with_shared_experts, small_dense
from workers.config import ParallelConfig, WorkerConfig
from workers.errors import InvalidConfig
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.progress import loading
from workers.model.checkpoint.weights import Checkpoint
from workers.model.cpu.rank_runner import load_rank
from workers.model.cpu.runner import TorchRunner
from workers.model.decoder.ernie import Ernie
from workers.model.decoder.layers import compute_dtype
from workers.model.decoder.rank import initial_placement, share_bytes
from workers.model.native.rank import NativeRank
from workers.model.parallel.collectives import Links
from workers.model.parallel.expert_placement import Placement
from workers.model.parallel.layout import Layout
from workers.runner import Batch, LayerHook, SequenceSlice


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 230 MB in fp32, most of it experts."""
    return moe_with_shared_experts(
        tmp_path_factory.mktemp("wide"), hidden_size=512, moe_intermediate_size=512, moe_num_experts=16,
        num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4, head_dim=64, intermediate_size=1024,
        vocab_size=4000,
    ).folder  # fmt: skip


def config(folder: Path, native: bool = True, **parallel: Any) -> WorkerConfig:
    return WorkerConfig(
        model=str(folder), max_model_len=64, kv_memory_bytes=1 << 20, native=native, parallel=ParallelConfig(**parallel)
    )


def load_and_measure(folder: str, native: bool, parallel: dict[str, int], answer: Any) -> None:
    """In a process of its own: (how far RSS rose at its highest, bytes of the share, of those to be read how many are left)."""
    from workers.model.decoder.layers import Linear

    torch.set_num_threads(1)
    settings = config(Path(folder), native, **parallel)
    dimensions = ErnieConfig.load(Path(folder))
    Linear(torch.zeros(256, 256))(torch.zeros(300, 256))  # what libraries allocate once
    before = rss("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    placement = initial_placement(settings, dimensions)
    rank = settings.parallel.size - 1
    runner = load_rank(settings, rank, Links(), placement)
    layout = Layout.of(settings.parallel, dimensions, rank)
    share = share_bytes(dimensions, layout, placement, torch.float32, copies_tied_head=not native)
    read = loading()
    left = read.num_bytes - read.num_bytes_read
    answer.put((rss("VmHWM") - before - runner.kv_memory.layout.pool_bytes, share, left))


def rss(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(folder: Path, native: bool, parallel: dict[str, int]) -> tuple[int, int, int]:
    context = mp.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=load_and_measure, args=(str(folder), native, parallel, answer))
    process.start()
    grown, share, left = answer.get()
    process.join()
    return grown, share, left


@pytest.mark.parametrize("native", [True, False])
def test_loading_takes_less_than_a_fifth_more_than_the_share(folder: Path, native: bool) -> None:
    """Between two shares, so that what libraries take whatever the model is (some 40 MB) does not count."""
    whole_grown, whole, whole_left = measure(folder, native, {})
    part_grown, part, part_left = measure(folder, native, {"expert_parallel": 4, "tensor_parallel": 4})
    assert whole_left == part_left == 0, "progress ends where loading does"
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
    placement = initial_placement(settings, ErnieConfig.load(tmp_path))
    for native in (True, False):
        with pytest.raises(InvalidConfig, match=r"experts\.15\.up_proj"):
            load_rank(replace(settings, native=native), 0, Links(), placement)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_expert_leaves_its_slot_as_the_checkpoint_has_it_and_finds_another(folder: Path, dtype: str) -> None:
    """By way of the kernels' own layout, and of PyTorch's, which give the same bytes."""
    settings = replace(config(folder, expert_parallel=2), dtype=dtype)
    dimensions = ErnieConfig.load(folder)
    placement = initial_placement(settings, dimensions)
    served: torch.dtype = getattr(torch, dtype)

    def stored(expert: int, kind: torch.dtype) -> torch.Tensor:
        checkpoint, prefix = Checkpoint(folder), f"model.layers.2.mlp.experts.{expert}"
        parts = [checkpoint.take(f"{prefix}.{name}_proj.weight", (512, 512), kind) for name in ("gate", "up", "down")]
        return torch.cat([part.flatten() for part in parts]).view(torch.uint8)

    for native in (True, False):
        rank = load_rank(replace(settings, native=native), 1, Links(), placement)
        assert isinstance(rank.model, NativeRank if native else Ernie)
        kind = served if native else compute_dtype(served)
        mixture, held = rank.model.mixtures[1], placement.held_by(1, 1)
        assert all(torch.equal(mixture.expert_bytes(slot), stored(held[slot], kind)) for slot in (0, 7))
        # one that stays, two that change places, one that is copied twice, one that comes from elsewhere, the others stay
        mixture.rearrange([0, 2, 1, 3, 3, 3, stored(0, kind), 7])
        wanted = [held[at] for at in (0, 2, 1, 3, 3, 3)] + [0, held[7]]
        assert all(torch.equal(mixture.expert_bytes(slot), stored(wanted[slot], kind)) for slot in range(8))


def test_a_rank_alone_computes_what_the_whole_model_does_and_calls_its_hook(tmp_path: Path) -> None:
    dense = small_dense(tmp_path, hidden_size=96, num_attention_heads=4, head_dim=32, num_hidden_layers=5).folder
    settings = config(dense)
    rank = load_rank(settings, 0, Links(), Placement(1, ()))
    whole = TorchRunner.load(replace(settings, kv_memory_bytes=1 << 20))
    batch = Batch((SequenceSlice(0, range(5, 60), 0, (1,)),))
    found: list[int] = []
    assert torch.equal(rank.hidden_states(batch, LayerHook(2, found.append)), whole.hidden_states(batch))
    assert found == [2, 4]
    assert bytes(rank.kv_memory.bytes) == bytes(whole.kv_memory.bytes)
