"""The noise is the documented hash, uniform, and unrelated between neighbours."""

from __future__ import annotations

import pytest
import torch

from workers.sampling.noise import gumbel_noise, noise_key, random_bits

MASK = 2**32 - 1


def triple_32(x: int, added: int) -> int:
    """The published hash of x, with a number added after its first multiplication, on Python's integers."""
    x = (x ^ x >> 17) * 0xED5AD4BB + added & MASK
    x = (x ^ x >> 11) * 0xAC4C1B51 & MASK
    x = (x ^ x >> 15) * 0x31848BAB & MASK
    return x ^ x >> 14


def test_the_bits_are_those_of_the_published_hash() -> None:
    keys = [0, 1, noise_key(5, 0, 3), noise_key(-1, 2, 0), 2**64 - 1]
    bits = random_bits(keys, 200)
    for row, key in enumerate(keys):
        low, high = key & MASK, key >> 32
        assert bits[row].tolist() == [triple_32(token + low & MASK, high) >> 1 for token in range(200)]


def test_the_key_is_split_mix_64_over_seed_choice_and_position() -> None:
    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    golden = 0x9E3779B97F4A7C15
    assert mix(golden) == 0xE220A8397B1DCDAF  # the first output of the reference implementation for seed 0
    key = 0
    for part in (5, 0, 3):
        key = mix(((key ^ mix(part + golden)) + golden) % 2**64)
    assert noise_key(5, 0, 3) == key


def test_keys_differ_wherever_seed_choice_or_position_do() -> None:
    seeds = (-(2**63), -1, 0, 1, 2, 2**62, 2**63 - 1)
    keys = {noise_key(seed, choice, position) for seed in seeds for choice in range(8) for position in range(64)}
    assert len(keys) == 7 * 8 * 64


def test_a_token_has_its_noise_whatever_the_vocabulary_and_the_other_rows() -> None:
    keys = [noise_key(1, 0, position) for position in range(9)]
    wide = gumbel_noise(keys, 1003)
    assert torch.equal(gumbel_noise(keys[4:5], 17)[0], wide[4, :17])
    assert torch.equal(gumbel_noise(keys[::-1], 1003), wide.flip(0))


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_bits_are_uniform_and_neighbours_are_uncorrelated(axis: str) -> None:
    keys = [noise_key(*((i if axis == name else 0) for name in ("seed", "choice", "position"))) for i in range(200)]
    u = random_bits(keys, 1000).double() / 2**31
    counts = torch.histc(u.flatten(), bins=256, min=0, max=1)
    expected = u.numel() / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 330.5  # 255 degrees of freedom, p = 0.001
    centred = u - 0.5
    limit = 4 / (12 * u.numel() ** 0.5)  # four standard deviations of the mean product of independent uniforms
    for left, right in [
        (centred[:-1], centred[1:]),
        (centred[:, :-1], centred[:, 1:]),
        (centred[:-1, 1:], centred[1:, :-1]),
    ]:
        assert abs(float((left * right).mean())) < limit


def test_gumbel_noise_is_finite_with_the_mean_and_variance_of_its_name() -> None:
    noise = gumbel_noise([noise_key(0, 0, position) for position in range(200)], 1000).double()
    assert bool(noise.isfinite().all())
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.015)
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 6, abs=0.03)
