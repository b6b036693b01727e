"""One pool for a group: ranks of a host write their own heads of one memory, and a transfer sees whole blocks."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace

import pytest
import torch

from tests.builders import fake_layout, generate_alone, make_engine, make_request, run_to_end, tokens_of
from workers.config import ParallelConfig, WorkerConfig
from workers.engine.fake_runner import FakeRunner
from workers.errors import RankLost, TransferFailed
from workers.group.memory import GroupKvMemory, RemotePart, put_heads, take_heads
from workers.group.messages import Blocks, GetBlocks, PutBlocks
from workers.kv_memory.memory import JoinedKvMemory, KvLayout, KvMemory, MappedKvMemory, SharedHandle
from workers.kv_tiers.opening import host_bytes
from workers.kv_tiers.tiers import KvTiers
from workers.model.decoder.kv_tensors import KvPool
from workers.model.parallel.layout import Share
from workers.runner import BLOCK_SIZE

LAYOUT = KvLayout(6, 2, num_kv_heads=4, block_size=BLOCK_SIZE, head_dim=8, dtype="float32", itemsize=4)


def write_all(pool: KvPool, blocks: list[int], rows: torch.Tensor, heads: slice) -> None:
    """Stores `rows` [T, 2, 4, 8] of both layers from the first position of the first block on, `heads` of them."""
    offsets = torch.arange(len(rows))
    slots = pool.slots(torch.tensor(blocks)[offsets // BLOCK_SIZE], offsets % BLOCK_SIZE)
    for layer in range(2):
        pool.write(layer, slots, (rows[:, :, heads] + layer).flatten(1, 2))


def test_ranks_that_write_their_heads_leave_the_bytes_of_a_single_writer() -> None:
    rows = torch.randn(100, 2, 4, 8)
    alone, shared = KvMemory(LAYOUT), KvMemory(LAYOUT)
    write_all(KvPool(alone), [2, 5], rows, slice(0, 4))
    parts = [KvPool(JoinedKvMemory(shared.handle, LAYOUT), Share(first, 2, 4)) for first in (0, 2)]
    for part, heads in zip(parts, (slice(0, 2), slice(2, 4)), strict=True):
        write_all(part, [2, 5], rows, heads)
    assert (alone.bytes == shared.bytes).all()

    whole_keys, whole_values = KvPool(alone).read(1, torch.tensor([5, 2]))
    keys, values = (torch.cat(each, 1) for each in zip(*(p.read(1, torch.tensor([5, 2])) for p in parts), strict=True))
    assert torch.equal(keys, whole_keys) and torch.equal(values, whole_values)
    assert torch.equal(whole_keys[1, :, :64], rows[:64, 0].transpose(0, 1) + 1)


def test_a_rank_clears_its_own_heads_and_no_other() -> None:
    memory = KvMemory(LAYOUT)
    memory.bytes[:] = 1
    KvPool(memory, Share(2, 2, 4)).clear(torch.tensor([3]))
    blocks = memory.bytes.reshape(6, 2 * 2, 4, -1)
    assert not blocks[3, :, 2:].any()
    assert blocks[3, :, :2].all() and blocks[[0, 1, 2, 4, 5]].all()


def test_a_part_of_the_blocks_is_addressed_by_the_groups_own_numbers() -> None:
    """A rank elsewhere holds blocks 4 and 5 of the group, in a memory of two blocks."""
    here, there = KvMemory(LAYOUT), KvMemory(replace(LAYOUT, num_blocks=2))
    rows = torch.randn(70, 2, 4, 8)
    write_all(KvPool(here), [5, 4], rows, slice(0, 4))
    write_all(KvPool(there, first_block=-4), [5, 4], rows, slice(0, 4))
    for at in range(2):
        assert (here.block(4 + at, 0, 2) == there.block(at, 0, 2)).all()


def fill(handle: SharedHandle, value: int) -> None:
    JoinedKvMemory(handle, LAYOUT).block(1, 0, 2)[:] = value


def test_another_process_writes_into_the_pool_and_outlives_nothing() -> None:
    memory = KvMemory(LAYOUT)
    rank = multiprocessing.get_context("spawn").Process(target=fill, args=(memory.handle, 7))
    rank.start()
    rank.join(60)
    assert rank.exitcode == 0
    assert (memory.block(1, 0, 2) == 7).all()
    assert (MappedKvMemory(memory.handle, LAYOUT).block(1, 0, 2) == 7).all(), "a peer sees what the rank wrote"


@pytest.mark.parametrize("fault", ["gone", "nonce", "size"])
def test_a_pool_that_is_not_the_groups_is_not_joined(fault: str) -> None:
    memory = KvMemory(LAYOUT)
    handle = {
        "gone": replace(memory.handle, fd=os.open("/dev/null", os.O_RDONLY)),
        "nonce": replace(memory.handle, nonce=b"x" * 16),
        "size": replace(memory.handle, num_bytes=4096),
    }[fault]
    with pytest.raises(TransferFailed):
        JoinedKvMemory(handle, LAYOUT)


class RemoteRunner(FakeRunner):
    """Computes in a memory of its own, as a rank on another host or a GPU; the group's is what others see of it."""

    def __init__(self, num_blocks: int) -> None:
        layout = replace(fake_layout(), num_blocks=num_blocks)
        self.own, self.is_lost = KvMemory(layout), False
        super().__init__(self.own)
        part = RemotePart(1, 0, 0, layout.num_kv_heads)
        self.group = GroupKvMemory(layout, num_blocks, lambda: [part], self._ask)

    @property
    def kv_memory(self) -> KvMemory:
        return self.group

    def _ask(self, rank: int, message: GetBlocks | PutBlocks, epoch: int | None) -> Blocks:
        if self.is_lost:
            raise RankLost("the group is between two epochs")
        heads = self.own.layout.num_kv_heads
        if isinstance(message, GetBlocks):
            return Blocks(tail=take_heads(self.own, message.blocks, 0, heads))
        put_heads(self.own, message.blocks, 0, heads, message.tail)
        return Blocks()


@pytest.mark.parametrize("lost", ["", "down", "up"])
def test_a_rank_elsewhere_gets_its_evicted_blocks_back_or_computes_them(lost: str) -> None:
    runner = RemoteRunner(num_blocks=6)
    engine = make_engine(runner, tiers=KvTiers(runner.kv_memory, num_host_blocks=16))
    request, other = (make_request(range(first, first + 3 * BLOCK_SIZE + 1), 2) for first in (5, 400))
    found = []
    for name, asked in enumerate((request, other, request)):
        runner.is_lost = lost == ("", "down", "up")[name]
        engine.add(name, asked)
        outputs = run_to_end(engine)
        found.append((tokens_of(outputs, name), outputs[0][1].cached_tokens))
    assert found[0][0] == found[2][0] == generate_alone(request)
    assert found[2][1] == (2 if lost else 3) * BLOCK_SIZE  # two are in the pool still


def test_a_group_on_gpus_keeps_evicted_blocks_in_host_memory_only_when_told_to() -> None:
    """Each of them would be asked for between two steps."""
    alone = WorkerConfig(model="x", device="cuda")
    group = replace(alone, parallel=ParallelConfig(expert_parallel=2))
    assert host_bytes(alone, LAYOUT) > 0 == host_bytes(group, LAYOUT)
    assert host_bytes(replace(group, kv_host_bytes=4096), LAYOUT) == 4096
