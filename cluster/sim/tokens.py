"""Tokens of simulated requests: functions of who asks and of the position alone, and cheap to make in long runs. Knows no requests and no model."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

from cluster.sim.product import PromptTokens, SamplingParams, token_bytes

VOCAB_SIZE = 100_000
_FIRST = 1000
"""Tokens below this number say which piece of text follows, those from it on are drawn."""
_BITS = 16
_MASK = (1 << _BITS) - 1
_LONGEST = 1 << 17
_STRIDE = 40_503


def _shuffled() -> tuple[int, ...]:
    drawn = list(range(_FIRST, _FIRST + (1 << _BITS)))
    random.Random(7).shuffle(drawn)
    return tuple(drawn * (1 + _LONGEST // len(drawn)))


_TABLE = _shuffled()
_PACKED = token_bytes(_TABLE)
"""As PromptTokens has them."""


def output_run(seed: int, position: int, count: int) -> tuple[int, ...]:
    """Output tokens position .. position+count-1 of the request with this seed."""
    start = (seed * _STRIDE + position) & _MASK
    return _TABLE[start : start + count]


def draw_run(params: SamplingParams, position: int, count: int) -> tuple[int, ...]:
    """As workers.engine.leaping.DrawRun."""
    return output_run(params.seed or 0, position, count)


_NAME_TOKENS = 3
"""With so many tokens a piece of text begins, which no other piece begins with."""


def prompt_of(texts: Sequence[int], text_tokens: int, num_tokens: int) -> PromptTokens:
    """A prompt of `num_tokens` made of pieces of text of `text_tokens` each, at least three, the last one cut off."""
    tokens: list[int] = []
    packed: list[bytes] = []
    for text in texts:
        name = (text % _FIRST, text // _FIRST % _FIRST, text // _FIRST**2 % _FIRST)
        start = (text * _STRIDE) & _MASK
        end = start + max(0, text_tokens - _NAME_TOKENS)
        tokens += name
        tokens += _TABLE[start:end]
        packed += (struct.pack("<3i", *name), _PACKED[4 * start : 4 * end])
    prompt = PromptTokens(tokens[:num_tokens])
    prompt.packed = b"".join(packed)[: 4 * num_tokens]
    return prompt
