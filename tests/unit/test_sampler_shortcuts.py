"""The C++ shortcuts of drawing change no token: PyTorch's way, without them, is what they are compared with."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from test_sampler import spec
from torch import Tensor

from tests.unit.model_configs import SHIPPED, load
from workers.model.native.build import build, default_cache_folder, supported
from workers.model.native.draw import NativeShortcuts
from workers.model.native.library import Library
from workers.native_build import cpu_description
from workers.request import SamplingParams
from workers.sampling.filters import _full_threshold, drop_unlikely
from workers.sampling.noise import gumbel_noise
from workers.sampling.sampler import sample

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not supported(cpu_description()),
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
    {"top_p": 0.95, "temperature": 1.5, "repetition_penalty": 1.3, "logit_bias": ((3, 4.0),)},
    {"temperature": 0.0},
]


@pytest.fixture(scope="module")
def shortcuts() -> NativeShortcuts:
    torch.set_num_threads(1)
    return NativeShortcuts(Library(build(default_cache_folder())))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocab_size", [5, 16, 17, 1000, 6007])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 3.0, 30.0])
def test_every_draw_is_that_of_pytorch(shortcuts: NativeShortcuts, vocab_size: int, scale: float) -> None:
    specs = [
        spec(position, prompt=(1, 2), output=(3,), **{"temperature": 1.0, **params})
        for position in range(8)
        for params in VARIANTS
    ]
    logits = numbers(len(specs), vocab_size, seed=vocab_size) * scale
    assert sample(logits, specs, shortcuts) == sample(logits, specs)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_every_draw_from_a_real_vocabulary_is_that_of_pytorch(shortcuts: NativeShortcuts, scale: float) -> None:
    specs = [
        spec(seed, seed=seed, prompt=(1, 2), **{"temperature": 1.0, **params})
        for seed in range(3)
        for params in VARIANTS
    ]
    logits = numbers(len(specs), 103_424, seed=9) * scale
    assert sample(logits, specs, shortcuts) == sample(logits, specs)


def test_logits_that_are_no_numbers_are_left_to_pytorch(shortcuts: NativeShortcuts) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        logits = numbers(3, 100)
        logits[0, 70] = logits[1, 99] = value
        logits[2] = -torch.inf
        specs = [spec(temperature=1.0), spec(temperature=1.0), spec(temperature=1.0, top_p=0.5)]
        assert sample(logits, specs, shortcuts) == sample(logits, specs)


def test_sums_are_close_to_those_of_pytorch_for_all_bits_and_the_winner_is_a_candidate(
    shortcuts: NativeShortcuts,
) -> None:
    """Nothing less than the whole range of noise: the smallest and largest of millions of uniform numbers come up."""
    for key in (0, 1, 2**63, 2**64 - 1, *range(5, 60)):
        size = 60_000
        exact_V = gumbel_noise([key], size)[0]
        logits_V = -exact_V.round()  # makes the sums much alike, so that few are left out early
        candidates = shortcuts.candidates(logits_V, key)
        exact_V += logits_V
        assert candidates is not None and int(exact_V.argmax()) in candidates.tolist()
        told = shortcuts.sums_V > -torch.inf
        assert (shortcuts.sums_V - exact_V)[told].abs().max() < 1e-4
        assert told.sum() > 0.9 * size


def test_many_equal_winners_are_left_to_pytorch(shortcuts: NativeShortcuts) -> None:
    logits_V = -gumbel_noise([7], 1000)[0]
    assert shortcuts.candidates(logits_V, 7) is None
    few = shortcuts.candidates(logits_V[:200].contiguous(), 7)
    assert few is not None and few.tolist() == list(range(200))


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 10.0])
def test_a_nucleus_has_the_threshold_that_sorting_finds_or_none(shortcuts: NativeShortcuts, scale: float) -> None:
    num_found = 0
    for seed, size in enumerate([1, 3, 16, 700, 20_000, 103_424]):
        probabilities = torch.softmax(numbers(1, size, seed=seed) * scale, -1)
        for p in (1e-6, 0.01, 0.5, 0.9, 0.95, 0.99999):
            found = shortcuts.nucleus_threshold(probabilities[0], p)
            assert found is None or found == float(_full_threshold(probabilities, torch.tensor([[p]])))
            num_found += found is not None
    assert num_found >= (30 if scale else 10)


def test_a_sum_that_rounding_could_tip_is_left_to_pytorch(shortcuts: NativeShortcuts) -> None:
    assert shortcuts.nucleus_threshold(torch.tensor([0.25, 0.25, 0.25, 0.25]), 0.5) == 0.25
    edge = torch.tensor([0.5, 0.2, 0.25 - 2**-25])  # the larger two add up to where float rounding turns
    assert shortcuts.nucleus_threshold(edge, 0.75) is None
    logits = edge.log()[None]
    plain, quick = logits.clone(), logits.clone()
    drop_unlikely(plain, [SamplingParams(top_p=0.75)])
    drop_unlikely(quick, [SamplingParams(top_p=0.75)], shortcuts)
    assert torch.equal(plain, quick)


def test_a_runner_with_native_kernels_draws_with_them() -> None:
    assert isinstance(load(SHIPPED).shortcuts, NativeShortcuts)
    assert load(SHIPPED, native=False).shortcuts is None
