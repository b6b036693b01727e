"""Which tokens one sequence may draw next, by its grammar, its allowed tokens and its budget of thinking; knows no logits.

A pure function of parameters and output tokens: a replay, a migration or another worker finds the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from workers.grammar.language import said
from workers.request import SamplingParams
from workers.runner import TokenMask
from workers.sampling.constraint import ThinkingEnd, empty_mask, mask_of

if TYPE_CHECKING:
    import llguidance

UNWRITABLE = "no token of this model goes on as the grammar wants"


class SequenceConstraint:
    """Implements workers.sampling.constraint.Constraint. With a grammar it is ready once `begin` has been called, on any thread."""

    def __init__(self, params: SamplingParams, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._end = mask_of((token for token in eos_token_ids if token < vocab_size), vocab_size)
        self._thinking = ThinkingEnd(params.thinking) if params.thinking is not None else None
        ends = (*eos_token_ids, *params.stop_token_ids)
        self._static = mask_of((*params.allowed_token_ids, *ends), vocab_size) if params.allowed_token_ids else None
        self._has_grammar = bool(params.grammar)
        self._matcher: llguidance.LLMatcher | None = None
        self._mask = empty_mask(vocab_size)
        self._num_read = 0
        self.error = ""

    @property
    def is_ready(self) -> bool:
        return not self._has_grammar or self._matcher is not None or bool(self.error)

    def begin(self, matcher: llguidance.LLMatcher, output_token_ids: Sequence[int] = ()) -> None:
        """`matcher` is at the beginning of the grammar, and nobody else's; these tokens have come already."""
        self._read(matcher, output_token_ids)
        self._matcher = matcher

    def fail(self, error: str) -> None:
        self.error = self.error or error

    def follow(self, output_token_ids: Sequence[int], num_tokens: int) -> None:
        if self._matcher is not None and self._num_read < num_tokens:
            self._read(self._matcher, output_token_ids[self._num_read : num_tokens])

    def allowed(self, output_token_ids: Sequence[int]) -> TokenMask | None:
        if self._thinking is not None:
            forced = self._thinking.forced(output_token_ids)
            if forced is not None:
                return mask_of((forced,), self._vocab_size)
        if not self._has_grammar:
            return self._static
        self.follow(output_token_ids, len(output_token_ids))
        mask = self._by_grammar()
        if self._static is None:
            return mask
        both = mask & self._static
        return both if both.any() else mask

    def _by_grammar(self) -> TokenMask:
        """Where there is none, what ends the output: whoever draws looks at `error` afterwards."""
        matcher, mask = self._matcher, self._mask
        assert matcher is not None or self.error
        if not self.error and matcher is not None:
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            self.fail(said(matcher.get_error()) if matcher.is_error() else "" if mask.any() else UNWRITABLE)
        return self._end if self.error else mask

    def _read(self, matcher: llguidance.LLMatcher, token_ids: Sequence[int]) -> None:
        self._num_read += len(token_ids)
        if token_ids and not self.error and not matcher.consume_tokens(list(token_ids)):
            self.fail(f"the output does not follow its grammar: {said(matcher.get_error())}")
