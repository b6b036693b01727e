"""What one sequence's parameters and tokens change about its next logits, as arrays; kept from draw to draw. Knows no logits.

The work of one draw does not grow with the text before it: a token is counted once, when it is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from workers.errors import InvariantViolated
from workers.request import SamplingParams
from workers.runner import Ids, LogitEdits, SampleSpec
from workers.sampling.constraint import Constraint, without

_NO_IDS: Ids = np.zeros(0, dtype=np.int32)


def has_penalty(params: SamplingParams) -> bool:
    return bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)


def changes_logits(params: SamplingParams) -> bool:
    return bool(params.logit_bias or params.bad_words or has_penalty(params) or params.is_constrained)


def edits_of(spec: SampleSpec) -> LogitEdits | None:
    """Those that came with it, or, of a spec that stands alone, found from its histories; None where nothing changes."""
    if spec.edits is not None or not (spec.suppressed_token_ids or changes_logits(spec.params)):
        return spec.edits
    if spec.params.is_constrained:
        raise InvariantViolated("which tokens a grammar allows is found before they are drawn")
    return EditTracker(spec.params, spec.prompt_token_ids).edits(spec.output_token_ids, spec.suppressed_token_ids)


class EditTracker:
    """Makes the edits of one sequence's draws, in the order of its tokens."""

    def __init__(
        self, params: SamplingParams, prompt_token_ids: Sequence[int], constraint: Constraint | None = None
    ) -> None:
        self._constraint = constraint
        self._bias_ids, self._biases = _biases(params.logit_bias)
        self._words = _BadWords(params.bad_words, prompt_token_ids)
        self._prompt = prompt_token_ids if params.repetition_penalty != 1 else ()
        self._counts = _Counts(self._prompt) if has_penalty(params) else None

    def edits(self, output_token_ids: Sequence[int], suppressed_token_ids: Sequence[int] = ()) -> LogitEdits:
        """For the token that follows `output_token_ids`, which continue what the call before was given."""
        banned = self._words.banned(output_token_ids)
        if suppressed_token_ids:
            banned = np.concatenate((banned, np.array(suppressed_token_ids, dtype=np.int32)))
        allowed = None if self._constraint is None else self._constraint.allowed(output_token_ids)
        if allowed is not None:
            allowed, banned = without(allowed, banned), _NO_IDS
        if self._counts is None:
            return LogitEdits(self._bias_ids, self._biases, banned, _NO_IDS, _NO_IDS, allowed)
        if self._counts.num_read > len(output_token_ids):
            self._counts = _Counts(self._prompt)
        self._counts.read(output_token_ids)
        return LogitEdits(self._bias_ids, self._biases, banned, self._counts.ids, self._counts.counts, allowed)


class _Counts:
    """How often each token stands in the output; those of the prompt are there from the beginning."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        ids = np.unique(np.asarray(prompt_token_ids, dtype=np.int32))
        self.num_read = 0
        self._num = len(ids)
        self._place = dict(zip(ids.tolist(), range(len(ids)), strict=True))
        self._ids = np.resize(ids, len(ids) + 64)
        self._counts = np.zeros(len(ids) + 64, dtype=np.int32)

    @property
    def ids(self) -> Ids:
        return self._ids[: self._num]

    @property
    def counts(self) -> Ids:
        return self._counts[: self._num]

    def read(self, output_token_ids: Sequence[int]) -> None:
        for token in output_token_ids[self.num_read :]:
            place = self._place.setdefault(token, self._num)
            if place == self._num:
                if place == len(self._ids):
                    self._ids, self._counts = np.resize(self._ids, 2 * place), np.resize(self._counts, 2 * place)
                self._ids[place], self._counts[place] = token, 0
                self._num += 1
            self._counts[place] += 1
        self.num_read = len(output_token_ids)


class _BadWords:
    """Last tokens of the words whose other tokens end the text so far, which may begin in the prompt."""

    def __init__(self, words: tuple[tuple[int, ...], ...], prompt_token_ids: Sequence[int]) -> None:
        self._last, self._lengths = _last_tokens(words)
        longest = self._lengths[-1] if self._lengths else 0
        self._prompt_tail = tuple(prompt_token_ids[-longest:]) if longest else ()

    def banned(self, output_token_ids: Sequence[int]) -> Ids:
        if not self._lengths:
            return _NO_IDS
        longest = self._lengths[-1]
        text = tuple(output_token_ids[-longest:]) if longest else ()
        if len(text) < longest:
            text = (*self._prompt_tail, *text)
        endings = (text[len(text) - length :] for length in self._lengths if length <= len(text))
        found = [self._last[ending] for ending in endings if ending in self._last]
        return np.concatenate(found) if found else _NO_IDS


@lru_cache(maxsize=16)
def _biases(pairs: tuple[tuple[int, float], ...]) -> tuple[Ids, npt.NDArray[np.float32]]:
    """Kept, as `_last_tokens`, for the choices of one request, which have the same."""
    biases: dict[int, float] = {}
    for token, bias in pairs:
        biases[token] = biases.get(token, 0.0) + bias
    return np.fromiter(biases, np.int32, len(biases)), np.fromiter(biases.values(), np.float32, len(biases))


@lru_cache(maxsize=16)
def _last_tokens(words: tuple[tuple[int, ...], ...]) -> tuple[dict[tuple[int, ...], Ids], list[int]]:
    """By a word's other tokens, the last ones that are forbidden after them; and how many those others are, ascending."""
    last: dict[tuple[int, ...], list[int]] = {}
    for word in words:
        last.setdefault(word[:-1], []).append(word[-1])
    found = {beginning: np.array(tokens, dtype=np.int32) for beginning, tokens in last.items()}
    return found, sorted({len(beginning) for beginning in last})
