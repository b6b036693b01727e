"""Random noise without state: a hash of what is drawn, addressable for each token id; knows no logits.

A draw's key is made of seed, choice index and position with the mixing function of SplitMix64 (Steele, Lea and Flood 2014,
"Fast splittable pseudorandom number generators"). The bits for token id i are triple32 (Wellons 2018, "Prospecting for hash
functions") of i plus the key's low half, with the high half added after the first multiplication: 32-bit operations only,
which every processor has for many lanes at once. The variates are made with workers.sampling.arithmetic, so a re-run on any
device, any processor, in any batch, draws the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.sampling.arithmetic import logarithm, logarithm_from, on_device

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1
_HASH_1, _HASH_2, _HASH_3 = 0xED5AD4BB, 0xAC4C1B51, 0x31848BAB
_CPU = torch.device("cpu")


def noise_key(seed: int, choice_index: int, position: int) -> int:
    """64-bit key of one draw, unsigned."""
    key = 0
    for part in (seed, choice_index, position):
        key = _mix((key ^ _mix((part + _GOLDEN) & _MASK)) + _GOLDEN & _MASK)
    return key


def random_bits(keys: list[int], num_tokens: int, device: torch.device = _CPU) -> Tensor:
    """31 random bits for each key and token id, int32 [R, V] of values 0 .. 2^31-1."""
    low_R1 = on_device([[_signed(key & 0xFFFFFFFF)] for key in keys], device, torch.int32)
    high_R1 = on_device([[_signed(key >> 32)] for key in keys], device, torch.int32)
    # int32 sums and products wrap modulo 2^32, as the hash wants
    x = torch.arange(num_tokens, dtype=torch.int32, device=device) + low_R1
    x = (x ^ _shift_right(x, 17)).mul_(_signed(_HASH_1)).add_(high_R1)
    x = (x ^ _shift_right(x, 11)).mul_(_signed(_HASH_2))
    x = (x ^ _shift_right(x, 15)).mul_(_signed(_HASH_3))
    return _shift_right(x ^ _shift_right(x, 14), 1)


def gumbel_noise(keys: list[int], num_tokens: int, device: torch.device = _CPU) -> Tensor:
    """Standard Gumbel variates, fp32 [R, V]: argmax(logits + noise) is a draw from softmax(logits) (Gumbel-max trick).

    The variate is -ln(E), E = -ln(1-u) exponential; a small u makes a large one, and fp32 is finest near 0.
    """
    u = random_bits(keys, num_tokens, device).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return logarithm(_exponential(u)).neg_()


def _exponential(u: Tensor) -> Tensor:
    """-ln(1 - u) for u from 2^-32 to 1 - 2^-24; where 1 - u would lose the last bits of u, u itself is used."""
    rest = 1.0 - u
    bits = rest.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32).sub_(1.0)
    is_near_1 = exponent == 0
    return logarithm_from(torch.where(is_near_1, u.neg(), f), exponent.float()).neg_()


def _mix(z: int) -> int:
    z = (z ^ z >> 30) * _MIX_1 & _MASK
    z = (z ^ z >> 27) * _MIX_2 & _MASK
    return z ^ z >> 31


def _signed(value: int) -> int:
    """The int32 with the bits of an unsigned 32-bit value."""
    return value - 2**32 if value >= 2**31 else value


def _shift_right(x: Tensor, count: int) -> Tensor:
    """Logical shift; torch's own repeats the sign."""
    return (x >> count).bitwise_and_(2 ** (32 - count) - 1)
