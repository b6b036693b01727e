"""The exchange that keeps its split sizes on the device moves rows and adds outputs as AllToAll does, bit for bit.

torch's operations are emulated on host memory (tests/unit/symmetric_emulation.py); ranks are threads that talk over Gloo.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.symmetric_emulation import all_to_all_vdev_2d, all_to_all_vdev_2d_offset, emulated, noise
from workers.config import ParallelConfig, WorkerConfig
from workers.errors import InvalidConfig
from workers.model.cuda.rank_runner import wants_direct
from workers.model.parallel.collectives import Links, Stages, finish
from workers.model.parallel.direct_dispatch import DirectAllToAll, DirectBuffers
from workers.model.parallel.epoch import WorldEpoch, start_store
from workers.model.parallel.expert_dispatch import AllToAll, Exchange, ExpertTable

SIZE, E, K, D = 3, 5, 3, 8
SLOTS = (0, 1, 2, 3, 4, 0)
"""Two slots a rank, fewer than a token's choices, with copies of one expert."""
FIRST = (torch.tensor([[2, 3, 4]]), torch.tensor([[0, 1, 4]]), torch.empty(0, K, dtype=torch.int64))
"""Rank 1 gets one row, for both of its slots; beyond it the buffer is as it was made."""
CPU = torch.device("cpu")


def on_ranks(work: Callable[[int, Links, Any], Any], size: int = SIZE) -> list[Any]:
    """`work(rank, links, memory)` on each rank of a group, in threads of this process."""
    store = start_store("127.0.0.1")

    def run(rank: int) -> Any:
        links, memories = Links(), []
        epoch = WorldEpoch.join(
            1, ("127.0.0.1", store.port), rank=rank, size=size, tensor=1, host="127.0.0.1", timeout_s=30.0,
            aborted=threading.Event(), prepare=lambda named: memories.append(emulated(named, rank, size, CPU)),
        )  # fmt: skip
        links.use(epoch.world, epoch.tensor)
        return work(rank, links, memories[0])

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


def layer(exchange: Exchange, x: Tensor, weights: Tensor, experts: Tensor, shared: Tensor | None) -> Stages[Tensor]:
    """A mixture whose expert e multiplies by e + 1 and adds e, so that a row with a wrong expert shows."""
    receipt = yield from exchange.dispatch(x, weights, experts)
    sent = yield from exchange.arrive(receipt)
    slots = exchange.table.slots[rank_slots(exchange)]  # type: ignore[attr-defined]
    outputs = torch.full_like(sent.rows_AD, float("nan"))
    start = 0
    for expert, end in zip(slots, sent.ends_E.tolist(), strict=True):
        outputs[start:end] = sent.rows_AD[start:end] * (expert + 1) + expert
        start = end
    y = yield from exchange.combine(outputs, weights, sent.receipt, shared)
    return y


def add_fused(outputs_AD: Tensor, place_A: Tensor, weights_Tk: Tensor, shared_TD: Tensor | None) -> Tensor:
    """As a GPU's kernel may add: a product is not rounded before it is added."""
    total_TD = torch.zeros(len(weights_Tk), outputs_AD.shape[1])
    for place_T, weight_T in zip(place_A.view(weights_Tk.shape).T, weights_Tk.T, strict=True):
        total_TD = (total_TD.double() + outputs_AD[place_T].double() * weight_T[:, None].double()).float()
    if shared_TD is not None:
        total_TD = total_TD + shared_TD
    return total_TD.to(outputs_AD.dtype)


def rank_slots(exchange: Any) -> slice:
    rank, size = exchange._links.world.rank, exchange.table.slots_per_rank
    return slice(rank * size, (rank + 1) * size)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_meet_their_experts_and_come_home_with_the_bits_of_all_to_all(exact: bool, dtype: torch.dtype) -> None:
    """Passes of many and few tokens, one rank without any, several layers over the same buffers."""
    passes = [(1, 1, 0), (5, 0, 9), (0, 1, 0), (2, 3, 4), (0, 0, 0), (9, 6, 1)]

    def work(rank: int, links: Links, memory: Any) -> list[tuple[Tensor, Tensor]]:
        table = ExpertTable(SLOTS, E, SIZE, CPU)
        buffers = DirectBuffers(
            memory, num_ranks=SIZE, num_slots=2, num_choices=K, hidden_size=D, dtype=dtype, max_tokens=16, exact=exact
        )
        portable = AllToAll(links, table, exact, add_fused)
        direct = DirectAllToAll(links, table, buffers, add_fused)
        generator = torch.Generator().manual_seed(rank)
        found = []
        for at, tokens in enumerate(passes):
            T = tokens[rank]
            x = torch.randn(T, D, generator=generator).to(dtype)
            weights = torch.rand(T, K, generator=generator)
            experts = torch.rand(T, E, generator=generator).argsort(1)[:, :K] if at else FIRST[rank]
            shared = torch.randn(T, D, generator=generator).to(dtype) if T % 2 else None
            buffers.expect(sum(tokens))
            found.append(tuple(finish(layer(e, x, weights, experts, shared)) for e in (portable, direct)))
        return found

    for results in on_ranks(work):
        for expected, found in results:
            assert found.dtype == dtype and torch.equal(found, expected)
            assert not found.isnan().any()


def test_a_pass_that_the_buffers_cannot_hold_is_refused_before_anything_is_sent() -> None:
    buffers = DirectBuffers(
        _Alone(), num_ranks=2, num_slots=2, num_choices=2, hidden_size=D, dtype=torch.float32, max_tokens=8, exact=True
    )
    buffers.expect(8)
    with pytest.raises(ValueError, match="a pass of 9 tokens is above"):
        buffers.expect(9)


def test_the_emulation_does_what_the_documentation_of_the_operations_shows() -> None:
    """Two ranks with two experts each: c0 c1 c2 c3 and d0 d1 d2 d3 become c0 d0 c1 d1 and c2 d2 c3 d3, aligned or not."""

    def work(rank: int, links: Links, memory: Any) -> tuple[list[int], list[list[int]], list[int], list[list[int]]]:
        splits = torch.tensor([[5, 1, 0, 2], [7, 0, 0, 3]][rank])
        rows = torch.cat([torch.full((n,), 10 * rank + chunk) for chunk, n in enumerate(splits.tolist())])[:, None]
        out, home = (noise(torch.empty(n, 1, dtype=torch.int64)) for n in (32, 16))
        out_splits_offsets, back = (torch.empty(2, 4, dtype=torch.int64) for _ in range(2))
        all_to_all_vdev_2d(links.world, rows, out, splits, out_splits_offsets, major_align=8)
        all_to_all_vdev_2d_offset(links.world, out, home, out_splits_offsets.clone(), back)
        assert torch.equal(home[: len(rows)], rows), "the second operation undoes the first"
        return out.flatten().tolist(), out_splits_offsets.tolist(), back[0].tolist(), splits.tolist()

    for rank, (out, (lengths, offsets), home, splits) in enumerate(on_ranks(work, 2)):
        # chunks by expert, then source; the second expert begins at a multiple of 8, even behind an empty first one
        assert (lengths, offsets) == [([5, 7, 1, 0], [0, 5, 16, 17]), ([0, 0, 2, 3], [0, 0, 8, 10])][rank]
        chunks = [out[offset : offset + length] for length, offset in zip(lengths, offsets, strict=True)]
        assert chunks == [[0] * 5, [10] * 7, [1], []] if rank == 0 else [[], [], [3] * 2, [13] * 3]
        assert home == splits


class _Alone:
    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def scatter(self, *tensors: Tensor) -> None:
        raise AssertionError("nothing is to be sent")

    give_back = scatter


def settings(**parallel: Any) -> WorkerConfig:
    return WorkerConfig(model="x", device="cuda", parallel=ParallelConfig(**{"expert_parallel": 2, **parallel}))


def test_the_device_exchange_is_taken_where_it_is_asked_for_and_refused_with_the_reason_where_it_cannot_be() -> None:
    assert wants_direct(settings(dispatch="device"), can=True)
    for portable in ({}, {"dispatch": "all_to_all"}):
        assert not any(wants_direct(settings(**portable), can) for can in (True, False))
    with pytest.raises(InvalidConfig, match="needs a GPU and NVSHMEM"):
        wants_direct(settings(dispatch="device"), can=False)
    for refused in ({"dispatch": "device", "expert_parallel": 32},
                    {"dispatch": "device", "min_overlap_tokens": 8}):  # fmt: skip
        with pytest.raises(InvalidConfig, match=r"worker\.parallel\.dispatch must be"):
            settings(**refused)
    with pytest.raises(InvalidConfig, match=r"on cpu"):
        WorkerConfig(model="x", parallel=ParallelConfig(expert_parallel=2, dispatch="device"))
