"""The C++ kernels draw the tokens, and report the logprobs, that PyTorch's way does: bit for bit, over all parameters."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampler import spec
from torch import Tensor

from tests.unit.model_configs import SHIPPED, load
from workers.errors import InvariantViolated
from workers.model.native.build import build, default_cache_folder, supported
from workers.model.native.draw import NativeRowKernel
from workers.model.native.library import Library
from workers.request import SamplingParams
from workers.runner import LogitEdits, SampleSpec
from workers.sampling.constraint import mask_of
from workers.sampling.edits import EditTracker
from workers.sampling.logprobs import token_logprobs
from workers.sampling.noise import gumbel_noise, noise_key
from workers.sampling.sampler import sample, scores_of

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not supported(),
    reason="the kernels need a C++ compiler, and AVX2 with FMA or NEON",
)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.0, "logprobs": 2},
    {"temperature": 1e-4},
    {"top_k": 40},
    {"top_k": 1},
    {"top_p": 0.9},
    {"top_p": 0.999999},
    {"top_p": 1e-6},
    {"min_p": 0.02},
    {"top_k": 500, "top_p": 0.8, "min_p": 0.001},
    {"top_k": 5000, "temperature": 1.5},
    {"top_p": 0.95, "temperature": 1.5, "repetition_penalty": 1.3, "logit_bias": ((3, 4.0),)},
    {"temperature": 0.0},
    {"temperature": 1.0, "logprobs": 60},
    {"temperature": 1.0, "logprobs": 0, "logprob_token_ids": (4, 0, 2)},
    {"temperature": 0.0, "logprobs": 20, "presence_penalty": 1.5, "bad_words": ((3,), (2, 4))},
]


@pytest.fixture(scope="module")
def kernel() -> NativeRowKernel:
    return the_kernel()


@cache
def the_kernel() -> NativeRowKernel:
    torch.set_num_threads(1)
    return NativeRowKernel(Library(build(default_cache_folder())))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def edits_among(one: SampleSpec, allowed: Sequence[int], size: int) -> LogitEdits:
    """What the spec's parameters change, and that one of these tokens is to be drawn."""
    tracker = EditTracker(one.params, one.prompt_token_ids)
    edits = tracker.edits(one.output_token_ids, one.suppressed_token_ids)
    return replace(edits, allowed=mask_of(allowed, size))


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, list[SampleSpec]]:
    """Logits of some rows, and how to draw from each."""
    size = draw(st.sampled_from([1, 2, 5, 16, 17, 1000, 1024, 1025, 6007]))
    tokens = st.lists(st.integers(0, size - 1), max_size=40)
    scale = draw(st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0, 10.0, 300.0]))
    logits_RV = numbers(4, size, seed=draw(st.integers(0, 2**31))) * scale
    if draw(st.booleans()):
        logits_RV = logits_RV.round()  # many ties
    if draw(st.booleans()):
        odd = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
        logits_RV[draw(st.integers(0, 3)), draw(st.integers(0, size - 1))] = odd
    specs = []
    for _ in range(4):
        params = SamplingParams(
            temperature=draw(st.sampled_from([0.0, 1e-4, 0.3, 0.7, 1.0, 1.3, 2.0])),
            top_k=draw(st.sampled_from([0, 0, 1, 2, 20, 300, size, size + 3])),
            top_p=draw(st.one_of(st.just(1.0), st.floats(1e-6, 1.0))),
            min_p=draw(st.sampled_from([0.0, 0.0, 1e-40, 0.001, 0.05, 0.5, 1.0])),
            repetition_penalty=draw(st.sampled_from([1.0, 0.5, 1.1, 3.0])),
            presence_penalty=draw(st.one_of(st.just(0.0), st.floats(-2, 2))),
            frequency_penalty=draw(st.one_of(st.just(0.0), st.floats(-2, 2))),
            seed=draw(st.integers(-(2**63), 2**63 - 1)),
            logit_bias=tuple((token, draw(st.floats(-100, 100))) for token in draw(tokens)[:5]),
            bad_words=tuple((1, token) if draw(st.booleans()) else (token,) for token in draw(tokens)[:5]),
            logprobs=draw(st.sampled_from([None, None, 0, 3, 20])),
        )
        suppressed = tuple(draw(tokens)[:3])
        one = SampleSpec(params, draw(st.integers(0, 3)), len(specs), draw(tokens), draw(tokens), suppressed)
        if draw(st.booleans()):
            one.edits = edits_among(one, [*draw(tokens), draw(st.integers(0, size - 1))], size)
        specs.append(one)
    return logits_RV, specs


@settings(max_examples=80, deadline=None)
@given(rows())
def test_every_draw_is_that_of_pytorch_and_the_logits_stay(case: tuple[Tensor, list[SampleSpec]]) -> None:
    logits_RV, specs = case
    before = logits_RV.clone()
    found = sample(logits_RV, specs, the_kernel())
    assert torch.equal(logits_RV.view(torch.int32), before.view(torch.int32))
    assert repr(found) == repr(sample(logits_RV, specs))  # a logprob that is no number equals itself as text


@pytest.mark.parametrize("scale", [0.5, 3.0, 8.0])
def test_every_draw_from_a_real_vocabulary_is_that_of_pytorch(kernel: NativeRowKernel, scale: float) -> None:
    specs = [spec(9, seed=5, prompt=(1, 2), output=(2,), **{"temperature": 1.0, **params}) for params in VARIANTS]
    logits = numbers(len(specs), 103_424, seed=9) * scale
    assert sample(logits, specs, kernel) == sample(logits, specs)


@pytest.mark.parametrize("params", VARIANTS)
def test_nothing_is_drawn_but_what_a_mask_allows(kernel: NativeRowKernel, params: dict[str, Any]) -> None:
    size, allowed = 103_424, [5, 31, 32, 63, 64, 1000, 103_423]
    specs = [spec(position, output=(2,), **{"temperature": 1.0, **params}) for position in range(16)]
    for one in specs:
        one.edits = edits_among(one, allowed, size)
    logits = numbers(16, size, seed=3) * 3
    found = sample(logits, specs, kernel)
    assert found == sample(logits, specs)
    assert {drawn.token_id for drawn in found} <= set(allowed)


def test_a_forced_token_is_returned_and_its_neighbours_are_drawn(kernel: NativeRowKernel) -> None:
    logits = numbers(3, 100)
    specs = [spec(temperature=1.0), spec(forced=7), spec(1, temperature=1.0, logprobs=1)]
    assert sample(logits, specs, kernel) == sample(logits, specs)


def test_the_noise_is_that_of_pytorch_for_the_whole_range_of_its_bits(kernel: NativeRowKernel) -> None:
    """Logits that take the noise back make every sum nearly 0: each token's turn to win comes, by the last bits alone."""
    size = 60_000
    winners = set()
    for position in range(60):
        one = spec(position, temperature=1.0)
        logits = -gumbel_noise([noise_key(1, 0, position)], size) + numbers(1, size, seed=position) * 1e-6
        found = sample(logits, [one], kernel)
        assert found == sample(logits, [one])
        winners.add(found[0].token_id)
    assert len(winners) > 50


def test_tokens_that_the_temperature_makes_equal_are_kept_together(kernel: NativeRowKernel) -> None:
    logits = [3.0]
    for _ in range(6):
        logits.append(float(torch.nextafter(torch.tensor(logits[-1]), torch.tensor(-1.0))))
    logits_RV = torch.tensor([[*logits, *[-5.0] * 4000]]).repeat(100, 1)
    num_kept = set()
    for temperature in (0.7, 1.0, 1.3, 1.7, 2.0):
        specs = [spec(position, temperature=temperature, top_k=1) for position in range(100)]
        found = sample(logits_RV, specs, kernel)
        assert found == sample(logits_RV, specs)
        num_kept.add(len({drawn.token_id for drawn in found}))
    assert num_kept == {1, 2}


def test_a_token_outside_the_vocabulary_is_refused_before_it_is_touched(kernel: NativeRowKernel) -> None:
    for fields in ({"logit_bias": ((100, 1.0),)}, {"bad_words": ((-1,),)}):
        with pytest.raises(InvariantViolated, match="outside the vocabulary"):
            sample(numbers(1, 100), [spec(**fields)], kernel)
    with pytest.raises(InvariantViolated, match="outside the vocabulary"):
        kernel.score_tokens(numbers(1, 100), [100], 0, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 3, 17, 1500, 5000]), st.sampled_from([0.0, 1.0, 9.0]), st.integers(0, 20), st.integers(0, 99)
)
def test_logprobs_of_given_tokens_are_those_of_pytorch(size: int, scale: float, count: int, seed: int) -> None:
    logits_RV = numbers(6, size, seed=seed) * scale
    tokens = [(seed * 31 + row * 7) % size for row in range(6)]
    expected = token_logprobs(logits_RV, tokens, [count] * 6)
    assert list(scores_of(logits_RV, tokens, count, 3, the_kernel())) == expected
    assert list(scores_of(logits_RV, tokens, count, 3)) == expected
    assert scores_of(logits_RV, tokens, count, 3, the_kernel()) == scores_of(logits_RV, tokens, count, 3)


def test_logprobs_of_a_prompt_rank_equals_by_their_ids_where_the_last_place_is_shared_too() -> None:
    logits_RV = torch.tensor(
        [[1.0, 3.0, 3.0, 1.0, 1.0], [5.0, 1.0, 2.0, 3.0, 4.0], [0.0] * 5, [-1e9, 0.0, 1.0, -1e9, 2.0]]
    )
    expected = token_logprobs(logits_RV, [0, 1, 2, 3], [3] * 4)
    assert list(scores_of(logits_RV, [0, 1, 2, 3], 3, 1)) == expected
    assert [token for token, _ in expected[0].top] == [1, 2, 0]


def test_a_runner_with_native_kernels_draws_with_them() -> None:
    assert isinstance(load(SHIPPED).row_kernel, NativeRowKernel)
    assert load(SHIPPED, native=False).row_kernel is None
