"""Log-probabilities of prompt tokens as arrays: a long prompt has millions of them, which nobody can afford as objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.request import TokenLogprob

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
