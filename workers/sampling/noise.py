"""Random noise without state: a hash of what is drawn, addressable for each token id; knows no logits.

The bits for token id i are output i+1 of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators") started at a key made of seed, choice index and position. Integer operations only, so a re-run on any
device, in any batch, draws the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.sampling.placement import on_device

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1
_CPU = torch.device("cpu")


def noise_key(seed: int, choice_index: int, position: int) -> int:
    """64-bit key of one draw, unsigned."""
    key = 0
    for part in (seed, choice_index, position):
        key = _mix((key ^ _mix((part + _GOLDEN) & _MASK)) + _GOLDEN & _MASK)
    return key


def random_bits(keys: list[int], num_tokens: int, device: torch.device = _CPU) -> Tensor:
    """32 random bits for each key and token id, int64 [R, V] of values 0 .. 2^32-1."""
    return _bits_of(keys, torch.arange(num_tokens, dtype=torch.int64, device=device))


def _bits_of(keys: list[int], token_ids: Tensor) -> Tensor:
    """The same for some token ids only, on their device."""
    keys_R1 = on_device([[_signed(key)] for key in keys], token_ids.device, torch.int64)
    # int64 sums and products wrap modulo 2^64, as SplitMix64 wants
    z = (token_ids + 1) * _signed(_GOLDEN) + keys_R1
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    return _shift_right(z ^ _shift_right(z, 31), 32)


def gumbel_noise(keys: list[int], num_tokens: int, device: torch.device = _CPU) -> Tensor:
    """Standard Gumbel variates, fp32 [R, V]: argmax(logits + noise) is a draw from softmax(logits) (Gumbel-max trick).

    The variate is -log(E), E = -log(1-u) exponential; a small u makes a large one, and fp32 is finest near 0.
    """
    return _gumbel(random_bits(keys, num_tokens, device))


def gumbel_noise_of(key: int, token_ids: Tensor) -> Tensor:
    """The same variates of one key, for some token ids only: fp32 [len(token_ids)]."""
    return _gumbel(_bits_of([key], token_ids))[0]


def _gumbel(bits: Tensor) -> Tensor:
    u = ((bits.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def _mix(z: int) -> int:
    z = (z ^ z >> 30) * _MIX_1 & _MASK
    z = (z ^ z >> 27) * _MIX_2 & _MASK
    return z ^ z >> 31


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit value."""
    return value - 2**64 if value >= 2**63 else value


def _shift_right(z: Tensor, count: int) -> Tensor:
    """Logical shift; torch's own repeats the sign."""
    shifted: Tensor = (z >> count) & (2 ** (64 - count) - 1)
    return shifted
