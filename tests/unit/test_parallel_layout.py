"""Layouts give every part of the model to the ranks exactly once, and refuse with the reason what cannot be cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.settings import build
from workers.config import ParallelConfig
from workers.errors import InvalidConfig
from workers.model.checkpoint.ernie_config import ErnieConfig, MoeConfig
from workers.model.parallel.layout import Layout, check

DENSE_0_3B = ErnieConfig(
    vocab_size=103424, hidden_size=1024, intermediate_size=3072, num_layers=18, num_heads=16, num_kv_heads=2,
    head_dim=128, max_position_embeddings=131072, rope_theta=500_000, rms_norm_eps=1e-5, tie_word_embeddings=True,
    moe=None, eos_token_ids=(2,),
)  # fmt: skip
MOE_21B = replace(
    DENSE_0_3B, hidden_size=2560, intermediate_size=12288, num_layers=28, num_heads=20, num_kv_heads=4,
    moe=MoeConfig(64, 6, 2, 1536, 1, 27, 1, 1e-12),
)  # fmt: skip
MOE_300B = replace(
    DENSE_0_3B, hidden_size=8192, intermediate_size=28672, num_layers=54, num_heads=64, num_kv_heads=8,
    tie_word_embeddings=False, moe=MoeConfig(64, 8, 0, 3584, 3, 53, 1, 1e-12),
)  # fmt: skip


def parallel(experts: int, tensor: int = 1, redundant: int = 0) -> ParallelConfig:
    return ParallelConfig(expert_parallel=experts, tensor_parallel=tensor, redundant_experts=redundant)


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (DENSE_0_3B, [(1, 1), (1, 2)]),
        (MOE_21B, [(1, 1), (2, 1), (4, 4), (8, 1), (8, 2), (16, 4), (64, 1)]),
        (MOE_300B, [(8, 1), (8, 8), (16, 8), (32, 4), (64, 1)]),
    ],
)
def test_the_published_models_can_be_laid_out(model: ErnieConfig, shapes: list[tuple[int, int]]) -> None:
    for experts, tensor in shapes:
        check(parallel(experts, tensor), model)
    if model.moe is not None:
        check(parallel(16, 1, 16), model)


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        (DENSE_0_3B, parallel(2), "this model is dense: use tensor_parallel"),
        (DENSE_0_3B, parallel(1, 1, 2), "this model is dense"),
        (DENSE_0_3B, parallel(1, 4), "does not divide the model's 2 key-value heads"),
        (MOE_21B, parallel(8, 8), "does not divide the model's 4 key-value heads"),
        (MOE_21B, parallel(1, 2), "must divide expert_parallel 1"),
        (MOE_21B, parallel(6), "redundant_experts 2 would"),
        (MOE_21B, parallel(8, 1, 4), "do not spread evenly"),
        (MOE_21B, parallel(2, 1, 128), "no rank needs an expert twice"),
        (replace(MOE_21B, num_heads=6, num_kv_heads=2), parallel(4, 4), "2 key-value heads"),
        (replace(MOE_21B, intermediate_size=12287), parallel(2, 2), "columns"),
        (replace(MOE_21B, vocab_size=1001), parallel(2, 2), "vocabulary"),
    ],
)
def test_a_layout_that_cannot_work_is_refused_with_the_reason(
    model: ErnieConfig, settings: ParallelConfig, reason: str
) -> None:
    with pytest.raises(InvalidConfig, match=reason):
        check(settings, model)


def test_settings_that_cannot_work_name_themselves() -> None:
    with pytest.raises(InvalidConfig, match=r"worker\.parallel\.expert_parallel must be at least 1"):
        build(ParallelConfig, {"expert_parallel": 0}, "worker.parallel")
    with pytest.raises(InvalidConfig, match=r"ranks_per_node .* divide the group's 4 ranks"):
        ParallelConfig(expert_parallel=4, ranks_per_node=3)
    with pytest.raises(InvalidConfig, match="rank 2 does not exist"):
        Layout.of(parallel(2), MOE_21B, 2)


@settings(deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 4), st.integers(0, 70))
def test_ranks_cover_every_head_and_every_row_once(tensor: int, pools: int, num_rows: int) -> None:
    layouts = [Layout(tensor * pools, tensor, rank) for rank in range(tensor * pools)]
    for pool in range(pools):
        mine = [layout for layout in layouts if layout.pool == pool]
        shares = [layout.share(16) for layout in mine]
        assert [share.first + at for share in shares for at in range(share.count)] == list(range(16))
        assert [row for layout in mine for row in range(*layout.rows(num_rows))] == list(range(num_rows))
        assert [layout.is_pool_head for layout in mine] == [True] + [False] * (tensor - 1)


def test_what_is_accepted_gives_every_rank_as_many_experts() -> None:
    accepted = 0
    for experts in range(1, 65):
        for tensor in (1, 2, 4):
            for redundant in range(65):
                try:
                    check(parallel(experts, tensor, redundant), MOE_21B)
                except InvalidConfig:
                    continue
                accepted += 1
                assert (64 + redundant) % experts == 0 and experts % tensor == 0
    assert accepted > 100
