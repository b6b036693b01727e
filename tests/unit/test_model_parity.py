"""The model computes what transformers computes from the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit.model_configs import (
    GREEDY,
    SHIPPED,
    Oracle,
    decode,
    dense_like_0_3b,
    greedy,
    load,
    logits,
    moe_with_shared_experts,
    moe_without_shared_experts,
    prefill,
    random_tokens,
)
from workers.model.cpu.runner import TorchRunner
from workers.runner import Batch, SampleSpec

Served = tuple[TorchRunner, Oracle]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="module", params=[True, False], ids=["native", "torch"])
def native(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module", params=["dense", "moe", "moe without shared experts", "shipped"])
def served(request: pytest.FixtureRequest, native: bool, tmp_path_factory: pytest.TempPathFactory) -> Served:
    makers: dict[str, Callable[..., Oracle]] = {
        "dense": dense_like_0_3b,
        "moe": moe_with_shared_experts,
        "moe without shared experts": moe_without_shared_experts,
    }
    if request.param in makers:
        oracle = makers[request.param](tmp_path_factory.mktemp("checkpoint"))
    else:
        model: Any = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
        oracle = Oracle(SHIPPED, model.eval())
    return load(oracle.folder, native=native), oracle


def test_every_prompt_position_has_the_logits_of_transformers(served: Served) -> None:
    runner, oracle = served
    tokens = random_tokens(333)
    assert (logits(runner, prefill(tokens)) - oracle.logits(tokens)).abs().max() < 1e-4


def test_every_decoded_position_has_the_logits_of_transformers(served: Served) -> None:
    runner, oracle = served
    tokens = random_tokens(150, seed=1)
    rows = [logits(runner, decode=[decode(token, position)]) for position, token in enumerate(tokens)]
    assert (torch.cat(rows) - oracle.logits(tokens)).abs().max() < 1e-4


def test_a_prompt_of_several_spans_has_the_logits_of_transformers(native: bool) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    runner, tokens = load(SHIPPED, max_model_len=2560, native=native), random_tokens(2200)
    expected = Oracle(SHIPPED, model.eval()).logits(tokens)
    assert (logits(runner, prefill(tokens, table=range(35))) - expected).abs().max() < 2e-4


def test_256_greedy_tokens_equal_those_of_transformers(served: Served) -> None:
    runner, oracle = served
    prompt = random_tokens(100, seed=2)
    tokens = greedy(runner, prompt, 256)
    assert tokens == oracle.greedy(prompt, 256)


def test_prompt_logprobs_are_those_of_transformers_across_chunks(served: Served) -> None:
    runner, oracle = served
    tokens = random_tokens(130, seed=3)
    first = prefill(tokens[:70], prompt_logprobs=2, next_token_id=tokens[70])
    last = prefill(tokens, 70, prompt_logprobs=2, sample=SampleSpec(GREEDY, 0, 0, tokens, ()))
    results = [runner.execute(Batch(prefill=(piece,)))[0] for piece in (first, last)]
    found = [entry for result in results for entry in result.prompt_logprobs or ()]
    assert [result.prompt_logprobs.first for result in results if result.prompt_logprobs] == [1, 71]

    expected = torch.log_softmax(oracle.logits(tokens), dim=-1)
    assert [entry.token_id for entry in found] == tokens[1:]
    for entry, row in zip(found, expected, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
        assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
        assert [logprob for _, logprob in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)
    assert results[0].token_id is None
    assert results[1].token_id == int(expected[-1].argmax())
