"""Each Triton kernel computes what the reference does, and a row's bits do not depend on its company.

On a machine without a GPU the kernels run in Triton's interpreter (tests/conftest.py); with one they are compiled.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tests.unit.interpreted_products  # noqa: F401
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.model.cuda.device_pool import DevicePool, StagedKvMemory
from workers.model.cuda.kernels.decode_attention import decode_attention
from workers.model.cuda.kernels.experts import choose_experts, combine
from workers.model.cuda.kernels.matmul import grouped_matmul, matmul, tile_for
from workers.model.cuda.kernels.prefill_attention import prefill_attention
from workers.model.cuda.kernels.rows import add_norm, rotate_and_store, swiglu
from workers.model.cuda.layers import Experts
from workers.model.cuda.step_inputs import ROW_COLUMNS, Upload, fill_decode_rows
from workers.model.decoder.attention import attend
from workers.model.decoder.kv_tensors import KvPool
from workers.model.decoder.layers import RMSNorm, RotaryEmbedding, rotate
from workers.model.decoder.moe import ExpertRouter
from workers.model.decoder.step_plan import plan_step
from workers.model.parallel.expert_dispatch import combine as reference_combine
from workers.model.parallel.expert_dispatch import dispatch
from workers.runner import Batch, SequenceSlice

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NARROW = torch.bfloat16 if torch.cuda.is_available() else torch.float16
"""The interpreter multiplies no bfloat16; float16 takes the same paths through the kernels."""
NUM_BLOCKS, LAYER = 16, 1
HEADS = [(16, 2, 128), (20, 4, 128), (64, 8, 128), (6, 3, 32), (4, 1, 24)]
"""Query heads, key-value heads, channels: of the 0.3B, 21B-A3B and 300B-A47B models, small, not a power of two."""


class Attention:
    """A pool of noise, as the reference and as the kernels see it, and queries for all rows of a step."""

    def __init__(self, H: int, K: int, C: int, dtype: torch.dtype = torch.float32) -> None:
        self.heads, self.dtype = (H, C), dtype
        name = str(dtype).removeprefix("torch.")
        self.layout = KvLayout(NUM_BLOCKS, 2, K, 64, C, name, dtype.itemsize)
        memory = KvMemory(self.layout)
        values = torch.from_numpy(memory.bytes).view(dtype)
        values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(1)))
        self.reference_pool, self.pool = KvPool(memory), DevicePool(self.layout, DEVICE)
        self.pool.values[:NUM_BLOCKS].view(-1).copy_(values)

    def queries(self, num_rows: int) -> Tensor:
        return torch.randn(num_rows, *self.heads, generator=torch.Generator().manual_seed(2)).to(self.dtype)

    def reference(self, q: Tensor, batch: Batch) -> Tensor:
        return attend(q, self.reference_pool, LAYER, plan_step(batch, self.reference_pool))

    def prefill(self, q: Tensor, *pieces: SequenceSlice) -> Tensor:
        inputs = Upload(DEVICE).prefill(pieces).prefill
        assert inputs is not None
        return prefill_attention(q.to(DEVICE), self.pool.layer(LAYER), inputs.tiles, inputs.tables).cpu()

    def decode(self, q: Tensor, *pieces: SequenceSlice, splits: tuple[int, int] = (3, 1)) -> Tensor:
        rows = decode_rows(pieces, self.pool.scratch_block)
        return decode_attention(q.to(DEVICE), self.pool.layer(LAYER), rows, *splits).cpu()


def decode_rows(pieces: tuple[SequenceSlice, ...], scratch_block: int) -> Tensor:
    rows = torch.zeros(len(pieces), ROW_COLUMNS + 8, dtype=torch.int32)
    fill_decode_rows(rows.numpy(), pieces, scratch_block)
    return rows.to(DEVICE)


def piece(start: int, end: int, first_block: int) -> SequenceSlice:
    return SequenceSlice(0, (0,) * (end - start), start, [(first_block + 3 * i) % NUM_BLOCKS for i in range(5)])


@pytest.fixture(params=HEADS, ids=lambda heads: "/".join(map(str, heads)))
def attention(request: pytest.FixtureRequest) -> Attention:
    return Attention(*request.param)


def test_decode_attention_is_the_reference_for_ragged_lengths(attention: Attention) -> None:
    pieces = tuple(piece(length - 1, length, i) for i, length in enumerate((1, 64, 65, 200)))
    q = attention.queries(len(pieces))
    found = attention.decode(q, *pieces)
    torch.testing.assert_close(found, attention.reference(q, Batch(decode=pieces)), atol=1e-5, rtol=1e-4)


def test_prefill_attention_is_the_reference_for_chunks_of_several_prompts(attention: Attention) -> None:
    pieces = (piece(30, 70, 0), piece(0, 3, 1)) if attention.heads[0] < 64 else (piece(3, 46, 0),)
    q = attention.queries(43)
    found = attention.prefill(q, *pieces)
    torch.testing.assert_close(found, attention.reference(q, Batch(prefill=pieces)), atol=1e-5, rtol=1e-4)


def test_attention_of_narrow_values_keeps_close_to_the_reference() -> None:
    attention = Attention(4, 2, 32, NARROW)
    q = attention.queries(70)
    prompts, tokens = (piece(10, 78, 0),), (piece(100, 101, 1), piece(5, 6, 2))
    expected = attention.reference(q, Batch(prompts, tokens))
    found = torch.cat([attention.prefill(q[:68], *prompts), attention.decode(q[68:], *tokens)])
    torch.testing.assert_close(found.float(), expected.float(), atol=2e-2, rtol=2e-2)


def test_decode_rows_have_the_same_bits_alone_and_together() -> None:
    attention = Attention(6, 3, 32)
    pieces = tuple(piece(length - 1, length, i) for i, length in enumerate((1, 64, 130, 300)))
    q = attention.queries(len(pieces))
    together = attention.decode(q, *pieces, splits=(16, 4))
    alone = [attention.decode(q[i : i + 1], one, splits=(16, 4)) for i, one in enumerate(pieces)]
    assert torch.equal(together, torch.cat(alone))


def test_prompt_rows_have_the_same_bits_in_chunks_of_any_size() -> None:
    attention, length = Attention(4, 2, 32), 150
    q = attention.queries(length + 5)
    whole = attention.prefill(q, piece(0, length, 0), piece(60, 65, 1))[:length]
    for size in (1 + length // 2, 64, 7 * 8):
        cuts = range(0, length, size)
        chunks = [attention.prefill(q[i : min(i + size, length)], piece(i, min(i + size, length), 0)) for i in cuts]
        assert torch.equal(torch.cat(chunks), whole)


def test_what_follows_the_last_token_in_a_block_does_not_matter() -> None:
    attention = Attention(4, 2, 32)
    q, prompt, token = attention.queries(40), piece(0, 40, 0), piece(39, 40, 0)
    clean = attention.prefill(q, prompt), attention.decode(q[-1:], token)
    attention.pool.values[0, :, :, :, 40:] = float("nan")
    assert torch.equal(attention.prefill(q, prompt), clean[0])
    assert torch.equal(attention.decode(q[-1:], token), clean[1])


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
def test_add_and_norm_have_the_roundings_of_the_reference(dtype: torch.dtype) -> None:
    x, y, weight = (torch.randn(size).to(dtype) for size in ((3, 96), (3, 96), (96,)))
    total, normed = (t.cpu() for t in add_norm(x.to(DEVICE), y.to(DEVICE), weight.to(DEVICE), 1e-5))
    assert torch.equal(total, x + y)
    torch.testing.assert_close(
        normed, RMSNorm(weight, 1e-5)(x + y), atol=1e-6, rtol=1e-2 if dtype.itemsize == 2 else 1e-5
    )
    assert torch.equal(add_norm(total.to(DEVICE), None, weight.to(DEVICE), 1e-5)[1].cpu(), normed)


@pytest.mark.parametrize(("H", "K", "C"), HEADS[-3:])
def test_queries_are_rotated_and_keys_and_values_stored(H: int, K: int, C: int) -> None:
    pool = DevicePool(KvLayout(3, 2, K, 64, C, "float32", 4), DEVICE)
    qkv = torch.randn(2, H + 2 * K, C)
    rows = torch.tensor([[7, 5, 2], [8, 66, 0]], dtype=torch.int32)
    rotary = RotaryEmbedding(C, 500_000.0, 128)
    cos, sin = (half.squeeze(1).to(DEVICE) for half in rotary.at(torch.arange(128)))
    q = rotate_and_store(qkv.flatten(1).to(DEVICE), (cos, sin), rows.to(DEVICE), pool.layer(1), H)
    turned = rotate(qkv[:, : H + K], rotary.at(rows[:, 1].long()))
    torch.testing.assert_close(q.cpu(), turned[:, :H], atol=1e-6, rtol=1e-5)
    for row, (block, offset) in enumerate(((2, 5), (0, 2))):
        stored = pool.values[block, 1, :, :, offset].cpu()
        torch.testing.assert_close(stored[0], turned[row, H:], atol=1e-6, rtol=1e-5)
        assert torch.equal(stored[1], qkv[row, H + K :])
    assert int((pool.values != 0).sum()) == 2 * 2 * K * C


def test_swiglu_is_the_reference() -> None:
    x = torch.randn(2, 2 * 1100)
    expected = F.silu(x[:, :1100]) * x[:, 1100:]
    torch.testing.assert_close(swiglu(x.to(DEVICE)).cpu(), expected, atol=1e-6, rtol=1e-5)


def test_experts_are_chosen_as_the_reference_chooses() -> None:
    scores, bias = torch.randn(4, 12), torch.randn(12) * 0.1
    router = ExpertRouter(torch.eye(12), bias, 3, 1e-12)
    weights, experts = choose_experts(scores.to(DEVICE), bias.to(DEVICE), 3, 1e-12)
    expected_weights, expected_experts = router(scores)
    assert torch.equal(experts.cpu().long(), expected_experts)
    torch.testing.assert_close(weights.cpu(), expected_weights, atol=1e-6, rtol=1e-5)


def test_equal_candidates_are_chosen_in_order_of_their_ids() -> None:
    _, experts = choose_experts(torch.zeros(1, 5, device=DEVICE), torch.zeros(5, device=DEVICE), 3, 1e-12)
    assert experts.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("is_decode", [True, False])
def test_products_are_the_reference_and_rows_have_the_same_bits_in_every_batch(is_decode: bool) -> None:
    tile = tile_for(is_decode, torch.float32)
    x, weight = torch.randn(70, 100, device=DEVICE), torch.randn(40, 100, device=DEVICE)
    y = matmul(x, weight, tile)
    torch.testing.assert_close(y, x @ weight.T, atol=1e-4, rtol=1e-4)
    for rows in (slice(0, 1), slice(0, 50), slice(64, 70), slice(13, 50)):  # the last: at other places of their tiles
        assert torch.equal(matmul(x[rows].contiguous(), weight, tile), y[rows])


@pytest.mark.parametrize("counts", [[0, 17, 0, 3, 1], [5, 0, 0, 0, 0], [0, 0, 0, 0, 33], [1, 1, 1, 1, 1]])
def test_grouped_products_meet_each_row_with_its_own_expert(counts: list[int]) -> None:
    x, weight = torch.randn(sum(counts), 24, device=DEVICE), torch.randn(5, 40, 24, device=DEVICE)
    ends = torch.tensor(counts, device=DEVICE).cumsum(0, dtype=torch.int32)
    expected = torch.cat([rows @ w.T for rows, w in zip(torch.split(x, counts), weight, strict=True)])
    found = grouped_matmul(x, weight, ends, tile_for(True, torch.float32))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("deterministic", "dtype"), [(True, NARROW), (True, torch.float32), (False, torch.bfloat16)])
def test_experts_return_what_the_reference_returns(deterministic: bool, dtype: torch.dtype) -> None:
    """The last case takes F.grouped_mm."""
    torch.manual_seed(3)
    x, gate_up, down = (torch.randn(size).to(dtype) for size in ((6, 16), (4, 16, 16), (4, 16, 8)))
    chosen, weights = torch.stack([torch.randperm(4)[:2] for _ in range(6)]), torch.rand(6, 2)
    layer = Experts(gate_up.to(DEVICE), down.to(DEVICE), deterministic)
    outputs, places = layer(x.to(DEVICE), chosen.int().to(DEVICE), is_decode=True)
    shared = torch.randn(6, 16).to(dtype)
    found = combine(outputs, places, weights.to(DEVICE), shared.to(DEVICE)).cpu()

    sent = dispatch(x, chosen, 4)
    parts = []
    for rows, up, back in zip(torch.split(sent.rows_AD, sent.counts_E), gate_up, down, strict=True):
        gate, linear = F.linear(rows, up).float().chunk(2, dim=-1)
        parts.append(F.linear((F.silu(gate) * linear).to(dtype), back))
    expected = reference_combine(torch.cat(parts), weights, sent.receipt) + shared
    torch.testing.assert_close(found.float(), expected, atol=0.25, rtol=2e-2)


def test_blocks_reach_the_host_to_be_sent_and_the_device_once_they_have_landed() -> None:
    layout = KvLayout(6, 2, 1, 64, 32, "float32", 4)
    pools = [DevicePool(layout, DEVICE) for _ in range(2)]
    source, target = (StagedKvMemory(pool) for pool in pools)
    pools[0].values.normal_()
    source.expose([4, 1, 2])
    assert not source.block(0, 0, 2).any() and source.block(1, 0, 2).any()
    for sent, taken in ((4, 0), (1, 5), (2, 3)):
        target.block(taken, 0, 2)[:] = source.block(sent, 0, 2)
    target.adopt([0, 5, 3])
    assert torch.equal(pools[1].values[[0, 5, 3]], pools[0].values[[4, 1, 2]])
    assert not pools[1].values[[1, 2, 4]].any()


def test_blocks_go_to_host_memory_and_back_past_the_mirror() -> None:
    layout = KvLayout(6, 2, 1, 64, 32, "float32", 4)
    pools = [DevicePool(layout, DEVICE) for _ in range(2)]
    source, target = (StagedKvMemory(pool) for pool in pools)
    pools[0].values.normal_()
    kept = np.zeros((3, layout.block_bytes), np.uint8)
    source.copy_out([4, 1, 2], list(kept))
    target.copy_in([0, 5, 3], list(kept))
    assert torch.equal(pools[1].values[[0, 5, 3]], pools[0].values[[4, 1, 2]])
    assert not pools[1].values[[1, 2, 4]].any() and not source.bytes.any() and not target.bytes.any()
