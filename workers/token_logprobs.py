"""How likely tokens were: of one that was drawn, and of a prompt's, in arrays. Plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.limits import ALTERNATIVES

MAX_SCORES = 4096
"""Prompt tokens whose logprobs one output says, with at most 20 alternatives each; fewer with more of them: 0.7 MiB."""
LOGPROB_FLOOR = -9999.0
"""Logprobs are clamped here: JSON has no -inf."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token and of the most likely alternatives, best first, natural log, >= -9999.

    `rank` is the token's place among the whole vocabulary in the order of `top`, 1 for the most likely one; None where
    nobody counted.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class PromptScores:
    """What prompt tokens number first, first + 1, ... scored, each under those before it; the prompt's token 0 has no score.

    Shapes: N tokens, K alternatives each, most likely first. Natural logarithms, as in TokenLogprob.
    """

    first: int
    token_ids: Ids
    """[N]"""
    logprobs: Floats
    """[N]"""
    ranks: Ids
    """[N]; 1 for the most likely token of the vocabulary."""
    top_ids: Ids
    """[N, K]"""
    top_logprobs: Floats
    """[N, K]"""

    def __len__(self) -> int:
        return len(self.token_ids)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PromptScores)
            and self.first == other.first
            and all(np.array_equal(mine, its) for mine, its in zip(self._arrays, other._arrays, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, index: int) -> TokenLogprob:
        top = zip(self.top_ids[index].tolist(), self.top_logprobs[index].tolist(), strict=True)
        rank = int(self.ranks[index])
        return TokenLogprob(int(self.token_ids[index]), float(self.logprobs[index]), tuple(top), rank)

    def __iter__(self) -> Iterator[TokenLogprob]:
        return (self[index] for index in range(len(self)))

    @property
    def end(self) -> int:
        """The number of the prompt token behind the last one."""
        return self.first + len(self)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    def part(self, start: int, stop: int) -> PromptScores:
        """Of the prompt tokens start .. stop-1, as far as they are here."""
        start, stop = max(start, self.first), min(stop, self.end)
        if (start, stop) == (self.first, self.end):
            return self
        rows = slice(start - self.first, max(start, stop) - self.first)
        ids, logprobs, ranks, top_ids, top_logprobs = self._arrays
        return PromptScores(start, ids[rows], logprobs[rows], ranks[rows], top_ids[rows], top_logprobs[rows])

    @property
    def _arrays(self) -> tuple[Ids, Floats, Ids, Ids, Floats]:
        return self.token_ids, self.logprobs, self.ranks, self.top_ids, self.top_logprobs


def scores_at_once(num_top: int) -> int:
    """Prompt tokens of one output with so many alternatives each."""
    return max(1, min(MAX_SCORES, MAX_SCORES * (ALTERNATIVES + 1) // (num_top + 1)))


def join(parts: Sequence[PromptScores]) -> PromptScores:
    """Parts that follow one another, at least one, as one."""
    if len(parts) == 1:
        return parts[0]
    return PromptScores(
        parts[0].first,
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.ranks for part in parts]),
        np.concatenate([part.top_ids for part in parts]),
        np.concatenate([part.top_logprobs for part in parts]),
    )
