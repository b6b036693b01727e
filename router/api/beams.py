"""Beam search over one prompt, as transformers does it: which beams go on, which have ended, when no better one can come.

Knows no tokens' texts, no workers and no waiting: it is told what each open beam's next token may be, and says which beams to ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workers.token_logprobs import TokenLogprob

Alternatives = Sequence[tuple[int, float]]
"""Tokens that may come next with their log-probabilities, the likeliest first."""


@dataclass(frozen=True, slots=True)
class BeamPlan:
    """`width` beams of at most `max_tokens` tokens; those in `end_token_ids` end one, and count as its last token.

    A beam's score is the sum of its log-probabilities over its number of generated tokens to the power of `length_penalty`.
    With `early_stopping` the search ends as soon as `width` beams have ended; without, when the best open beam, as long as it is,
    scores no better than the worst of them; with "never", when it could not if it went on to `max_tokens`.
    """

    width: int
    max_tokens: int
    end_token_ids: frozenset[int]
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    @property
    def num_alternatives(self) -> int:
        """Of each open beam: so many hold `width` that do not end it."""
        return self.width + len(self.end_token_ids)

    def score(self, logprob: float, num_tokens: int) -> float:
        return float(logprob / num_tokens**self.length_penalty)


@dataclass(frozen=True, slots=True)
class Beam:
    """Generated tokens and what each of them scored. `logprob` is their sum, natural log."""

    tokens: tuple[TokenLogprob, ...] = ()
    logprob: float = 0.0

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(entry.token_id for entry in self.tokens)


class BeamSearch:
    """Of one prompt. Ask for the next token of each beam in `open`, then tell `advance`, until `open` is empty."""

    def __init__(self, plan: BeamPlan) -> None:
        self._plan = plan
        self._ended: list[tuple[float, Beam]] = []
        """By score, the best first; at most `width`."""
        self._num_tokens = 0
        self.open: tuple[Beam, ...] = (Beam(),)

    @property
    def best(self) -> tuple[Beam, ...]:
        """Of a search that is over, the best first."""
        return tuple(beam for _, beam in self._ended)

    def advance(self, scored: Sequence[Alternatives]) -> None:
        """`scored`: of each open beam, in order, at least `num_alternatives` tokens, or all of the vocabulary."""
        plan = self._plan
        self._num_tokens += 1
        followers = [
            (beam.logprob + logprob, place, rank)
            for place, (beam, alternatives) in enumerate(zip(self.open, scored, strict=True))
            for rank, (_, logprob) in enumerate(alternatives)
        ]
        followers.sort(key=lambda follower: (-follower[0], *follower[1:]))  # what is equal keeps its order
        is_last = self._num_tokens == plan.max_tokens
        going_on: list[Beam] = []
        for number, (logprob, place, rank) in enumerate(followers):
            token_id, own = scored[place][rank]
            ends = is_last or token_id in plan.end_token_ids
            if number >= plan.width if ends else len(going_on) == plan.width:
                continue
            entry = TokenLogprob(token_id, own, tuple(scored[place]), rank + 1)
            beam = Beam((*self.open[place].tokens, entry), logprob)
            if ends:
                self._ended.append((plan.score(logprob, self._num_tokens), beam))
            else:
                going_on.append(beam)
        self._ended.sort(key=lambda ended: -ended[0])
        del self._ended[plan.width :]
        self.open = tuple(going_on) if self._may_improve(going_on) else ()

    def _may_improve(self, going_on: Sequence[Beam]) -> bool:
        plan = self._plan
        if not going_on or len(self._ended) < plan.width:
            return bool(going_on)
        if plan.early_stopping is True:
            return False
        is_open_ended = plan.early_stopping == "never" and plan.length_penalty > 0
        length = plan.max_tokens if is_open_ended else self._num_tokens
        return plan.score(going_on[0].logprob, length) > self._ended[-1][0]
