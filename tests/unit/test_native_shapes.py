"""The C++ kernels on models of any shape: what transformers computes, the same bits in any chunks, and errors for bad input."""

from __future__ import annotations

import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.model_configs import (
    Oracle,
    decode,
    dense_like_0_3b,
    load,
    logits,
    moe_with_shared_experts,
    prefill,
    random_tokens,
)
from workers.errors import InvariantViolated
from workers.model.native.build import build, default_cache_folder, supported
from workers.model.native.ernie import NativeErnie
from workers.model.native.library import Dimensions, Library

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not supported(), reason="needs g++, and AVX2 with FMA or NEON"
)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Changes to a builder of tests.unit.model_configs. Widths are even; heads and hidden states multiples of 32."""
    num_kv_heads = draw(st.integers(1, 3))
    shape: dict[str, Any] = dict(
        vocab_size=draw(st.integers(20, 300)),
        hidden_size=32 * draw(st.integers(1, 5)),
        head_dim=32 * draw(st.integers(1, 8)),
        num_key_value_heads=num_kv_heads,
        num_attention_heads=num_kv_heads * draw(st.integers(1, 8)),
        intermediate_size=2 * draw(st.integers(1, 60)),
        num_hidden_layers=draw(st.integers(1, 3)),
        tie_word_embeddings=draw(st.booleans()),
    )
    if draw(st.booleans()):
        num_experts = draw(st.integers(2, 20))
        shape |= dict(
            moe_num_experts=num_experts,
            moe_k=draw(st.integers(1, num_experts)),
            moe_intermediate_size=4 * draw(st.integers(1, 20)),  # transformers multiplies no other widths
            moe_num_shared_experts=draw(st.integers(0, 2)),
            moe_layer_start_index=0,
            moe_layer_end_index=-1,
        )
    return shape


def make(folder: Path, shape: dict[str, Any]) -> Oracle:
    return (moe_with_shared_experts if "moe_k" in shape else dense_like_0_3b)(folder, **shape)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(shapes(), st.integers(2, 150), st.integers(1, 9), st.data())
def test_a_model_of_any_shape_is_computed_as_by_transformers_and_alike_in_any_chunks(
    shape: dict[str, Any], length: int, rows: int, data: st.DataObject
) -> None:
    tokens = random_tokens(length, vocab_size=shape["vocab_size"])
    splits = sorted({0, length, *data.draw(st.lists(st.integers(1, length - 1), max_size=4))})
    with tempfile.TemporaryDirectory() as name:
        oracle = make(Path(name), shape)
        for dtype in ("float32", "bfloat16"):
            runner = load(Path(name), dtype, num_blocks=32, max_model_len=192, num_threads=1)
            assert isinstance(runner.model, NativeErnie)
            whole = logits(runner, prefill(tokens))
            expected = oracle.logits(tokens)
            # In bfloat16 an expert may be another one where two are about equal, so most rows must agree, not all.
            apart = (whole.softmax(-1) - expected.softmax(-1)).abs().sum(-1)
            assert apart.max() < 1e-3 if dtype == "float32" else apart.median() < 0.1

            threaded = load(Path(name), dtype, num_blocks=32, max_model_len=192, num_threads=2)
            company = [decode(tokens[0], 0, [16 + row]) for row in range(rows)]
            chunks = [
                logits(threaded, prefill(tokens[:end], start, range(8, 12)), decode=company)[: end - start]
                for start, end in pairwise(splits)
            ]
            assert torch.equal(torch.cat(chunks), whole)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_with_shared_experts(tmp_path_factory.mktemp("checkpoint")).folder


def test_sizes_that_the_kernels_cannot_compute_are_refused() -> None:
    library = Library(build(default_cache_folder()))
    for is_bf16 in (False, True):
        with pytest.raises(InvariantViolated, match="vocab_size is out of range"):
            library.create(Dimensions(), is_bf16)


def test_a_token_or_a_position_that_cannot_be_is_refused_and_the_next_step_is_computed(folder: Path) -> None:
    runner = load(folder)
    tokens = random_tokens(5)
    before = logits(runner, prefill(tokens))
    for wrong in (-1, 500, 2**62):
        with pytest.raises(InvariantViolated, match="a token is not in the vocabulary"):
            logits(runner, prefill([*tokens, wrong]))
    with pytest.raises(InvariantViolated, match="a block is not in the pool"):
        logits(runner, prefill(random_tokens(64), table=[10**6]))
    with pytest.raises(InvariantViolated, match="a position is out of range"):
        logits(runner, decode=[decode(tokens[0], 2**20, [0] * (2**14 + 1))])
    assert torch.equal(logits(runner, prefill(tokens)), before)
