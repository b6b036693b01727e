"""Learns from steps how long prompts take, and so bounds how much of them a step computes beside sequences that decode. Knows no clock."""

from __future__ import annotations

import math
import sys

from workers.runner import BLOCK_SIZE

_FADE = 0.95
"""What an older step weighs for each later one; so the last twenty or so count."""
_SPREAD = 0.02
"""How different steps must be, from 0 to 1, before it is told apart what a token takes and what those before it do."""
_MIXED_IN_A_ROW = 16
"""After so many steps with prompts and decoding one only decodes."""
_LEAST_SHARE = 1 / 256
"""Of a step's time prompts take at least."""
_FIRST_S_PER_TOKEN = 1e-4
"""Assumed of a prompt before any was computed here."""


class Pace:
    """A step's prompts take so long for each token, and for each token so long for each one before it.

    Beside sequences that decode a step takes prompts for at most `max_pause_s`, or for as long as decoding takes, if that is longer:
    where a model needs a second for one token, prompts that came in bites of 50 ms would take for ever.
    """

    def __init__(self, max_pause_s: float) -> None:
        self._max_pause_s = max_pause_s
        self._decode_s = 0.0
        """Of a step's decoding."""
        self._token_s, self._pair_s = _FIRST_S_PER_TOKEN, 0.0
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._num_mixed = 0
        """Steps with prompts and decoding since one that only decoded, which alone tells what decoding takes."""

    @property
    def allowance_s(self) -> float:
        """For the prompts of a step in which others decode."""
        if self._num_mixed >= _MIXED_IN_A_ROW and not math.isinf(self._max_pause_s):
            return 0.0
        return max(self._max_pause_s, self._decode_s)

    def took(self, step_s: float, num_decodes: int, prompt_tokens: int, prompt_context: int) -> None:
        """A step ended: how many sequences decoded in it, and how much of prompts it computed: tokens, and pairs with those before."""
        if not prompt_tokens:
            self._decode_s += 0.3 * (step_s - self._decode_s)
            self._num_mixed = 0
            return
        prompt_s = step_s
        if num_decodes:
            self._num_mixed += 1
            self._decode_s = min(self._decode_s, step_s)
            # Decoding may take less than it did: what is left for the prompts is not taken to be next to nothing then.
            foretold_s = self._token_s * prompt_tokens + self._pair_s * prompt_context
            prompt_s = max(step_s - self._decode_s, foretold_s / 2, step_s * _LEAST_SHARE)
        if prompt_s > 0.0:
            self._learn(prompt_tokens / prompt_s, prompt_context / prompt_s)

    def _learn(self, tokens_per_s: float, pairs_per_s: float) -> None:
        """Least squares of relative errors, neither part negative: a step that something else has held up counts little."""
        x, z = tokens_per_s, pairs_per_s
        self._sums = tuple(  # type: ignore[assignment]
            [_FADE * kept + new for kept, new in zip(self._sums, (x * x, x * z, z * z, x, z), strict=True)]
        )
        xx, xz, zz, sum_x, sum_z = self._sums
        determinant = xx * zz - xz * xz
        if determinant > _SPREAD * xx * zz:
            self._pair_s = max(0.0, (sum_z * xx - sum_x * xz) / determinant)
        self._token_s = (sum_x - self._pair_s * xz) / xx
        if self._token_s < 0:
            self._token_s, self._pair_s = 0.0, sum_z / zz

    def seconds(self, num_tokens: int, start: int) -> float:
        """That so many tokens of a prompt take behind `start` others."""
        return self._token_s * num_tokens + self._pair_s * (num_tokens * start + num_tokens**2 / 2)

    def tokens(self, seconds: float, start: int) -> int:
        """How many tokens of a prompt, behind `start` others, take so long; in whole blocks, if it is one at least."""
        if seconds <= 0.0:
            return 0
        if math.isinf(seconds):
            return sys.maxsize
        linear, square = self._token_s + self._pair_s * start, self._pair_s / 2
        divisor = linear + math.sqrt(linear * linear + 4 * square * seconds)
        count = int(2 * seconds / divisor) if divisor > 0 else sys.maxsize
        return count - count % BLOCK_SIZE if count > BLOCK_SIZE else count


class Room:
    """What a step may still take of prompts: tokens, and seconds as a Pace foretells them."""

    def __init__(self, num_tokens: int, seconds: float, pace: Pace) -> None:
        self._num_tokens = num_tokens
        self._seconds = seconds
        self._pace = pace
        self._is_untouched = True

    @property
    def is_full(self) -> bool:
        is_short = not self._is_untouched and self._pace.tokens(self._seconds, 0) < BLOCK_SIZE
        return self._num_tokens <= 0 or self._seconds <= 0 or is_short

    def fit(self, num_tokens: int, start: int) -> int:
        """How many of these tokens, behind `start` others, still fit; the first prompt of a step gets a block whatever it takes."""
        least = BLOCK_SIZE if self._is_untouched and self._seconds > 0 else 0
        return max(0, min(num_tokens, self._num_tokens, max(least, self._pace.tokens(self._seconds, start))))

    def take(self, num_tokens: int, start: int) -> None:
        """A step takes them."""
        self._is_untouched = False
        self._num_tokens -= num_tokens
        self._seconds -= self._pace.seconds(num_tokens, start)
