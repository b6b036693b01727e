"""The exponential and the logarithm that define draws and logprobs are close to the true ones, and add up exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from workers.request import SamplingParams
from workers.runner import SampleSpec
from workers.sampling.arithmetic import log_total, logarithm, logarithm_of, weights
from workers.sampling.filters import nucleus_threshold
from workers.sampling.noise import gumbel_noise, noise_key, random_bits
from workers.sampling.sampler import draw

PINNED_NOISE = [1058724483, -1094884167, 1063416624, 1078722357]
PINNED_TOTAL = 37166244509353


def test_the_logarithm_is_within_two_roundings() -> None:
    x = torch.exp(torch.linspace(-60, 60, 2_000_001))
    exact = x.double().log()
    assert float(((logarithm(x).double() - exact).abs() / exact.abs().clamp(min=0.5)).max()) < 2.0**-22


def test_weights_are_powers_of_e_rounded_to_integers() -> None:
    logits = torch.cat((torch.zeros(1), -torch.linspace(0, 45, 1_000_001), torch.full((1,), -torch.inf)))[None]
    found = weights(logits + 7, torch.tensor([[7.0]])).double()
    exact = ((logits + 7).double() - 7).exp() * 2.0**40
    assert bool((found == found.round()).all()) and float(found[0, 0]) == 2.0**40 and float(found[0, -1]) == 0
    assert float(((found - exact).abs() - 0.5).clamp(min=0).div(exact.clamp(min=1e-9)).max()) < 2.0**-22


def test_the_logarithm_of_a_total_is_that_of_doubles() -> None:
    for total in (1, 2, 3, 2**40, 2**40 + 1, 3 * 2**40, 7**19, 2**57 - 1):
        assert float(log_total(torch.tensor([total]))) == pytest.approx(math.log(total / 2**40), rel=1e-14, abs=1e-15)


def test_one_number_has_the_logarithm_of_many() -> None:
    assert logarithm_of(0.05) == float(logarithm(torch.tensor([0.05, 1.0]))[0]) == pytest.approx(math.log(0.05))


def test_every_variate_is_what_float64_makes_of_its_uniform_number() -> None:
    worst = 0.0
    for key in range(8):
        u = ((random_bits([key], 250_000).float() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24).double()
        exact = -torch.log(-torch.log1p(-u))
        worst = max(worst, float((gumbel_noise([key], 250_000).double() - exact).abs().max()))
    assert worst < 4e-6  # of numbers up to 22: one unit in the last place is 2e-6 there


def test_the_bits_that_are_pinned_stay_as_they_are_on_every_host() -> None:
    """Written down once: another processor or library that computes anything else draws other tokens."""
    noise = gumbel_noise([noise_key(1, 2, 3)], 1000).view(torch.int32).numpy()
    assert noise[0, :4].tolist() == PINNED_NOISE
    logits = torch.from_numpy(np.linspace(-30, 0, 1000, dtype=np.float32))[None]
    found = weights(logits, torch.zeros(1, 1)).to(torch.int64)
    assert int(found.sum()) == PINNED_TOTAL


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.99999])
@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
def test_a_nucleus_has_the_fewest_heaviest_tokens_in_exact_integers(p: float, scale: float) -> None:
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(4)) * scale
    weights_RV = weights(logits, logits.amax(-1, keepdim=True))
    found = nucleus_threshold(weights_RV, torch.full((3, 1), p, dtype=torch.float64))
    for row, threshold in zip(weights_RV.to(torch.int64).tolist(), found.squeeze(1).tolist(), strict=True):
        kept = sum(weight for weight in row if weight >= threshold)
        lighter = sum(weight for weight in row if weight > threshold)
        assert lighter < math.ceil(sum(row) * p) <= kept and threshold in row


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_frequencies_of_many_tokens_follow_their_softmax(temperature: float) -> None:
    logits = torch.randn(200, generator=torch.Generator().manual_seed(8)) * 1.5
    num_draws = 20_000
    specs = [SampleSpec(SamplingParams(temperature=temperature, seed=3), 0, i, (), ()) for i in range(num_draws)]
    counts = draw(logits.expand(num_draws, -1), specs).bincount(minlength=200)
    expected = torch.softmax(logits.double() / temperature, -1) * num_draws
    common = expected >= 10
    rare = float(expected[~common].sum())
    statistic = float(((counts - expected) ** 2 / expected)[common].sum())
    statistic += (float(counts[~common].sum()) - rare) ** 2 / rare if rare else 0.0
    freedom = int(common.sum())
    assert statistic < freedom + 3.3 * math.sqrt(2 * freedom)  # p = 0.001 or less
