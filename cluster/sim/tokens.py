"""Tokens of simulated requests: functions of who asks and of the position alone, and cheap to make in long runs. Knows no requests and no model."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cluster.sim.product import SamplingParams

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


def output_run(seed: int, position: int, count: int) -> tuple[int, ...]:
    """Output tokens position .. position+count-1 of the request with this seed."""
    start = (seed * _STRIDE + position) & _MASK
    return _TABLE[start : start + count]


def draw_run(params: SamplingParams, position: int, count: int) -> tuple[int, ...]:
    """As workers.engine.leaping.DrawRun."""
    return output_run(params.seed or 0, position, count)


def text_run(text: int, count: int) -> tuple[int, ...]:
    """The first `count` tokens of a piece of prompt text: no other piece begins alike. At least three."""
    start = (text * _STRIDE) & _MASK
    return (text % _FIRST, text // _FIRST % _FIRST, text // _FIRST**2 % _FIRST, *_TABLE[start : start + count - 3])


def prompt_of(texts: Sequence[int], text_tokens: int, num_tokens: int) -> tuple[int, ...]:
    """A prompt of `num_tokens` made of pieces of text of `text_tokens` each, the last one cut off."""
    prompt: list[int] = []
    for text in texts:
        prompt += text_run(text, text_tokens)
    return tuple(prompt[:num_tokens])
