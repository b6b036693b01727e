"""Turns one request's drawn tokens into text and decides when it ends; knows no logits and no scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.request import FinishReason, Request
from workers.text.stop import StopMatch, StopStrings


class Detokenizer(Protocol):
    """Text that became certain with each token; what is pushed and flushed adds up to the decoded tokens."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(slots=True)
class Progress:
    """What one token added. `stop_reason` as in workers.request.Output."""

    text: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class OutputState:
    """Per request: detokenizer, stop strings, lengths. A pure function of the tokens, so a replay rebuilds it."""

    def __init__(self, request: Request, detokenizer: Detokenizer, eos_token_ids: frozenset[int], max_len: int) -> None:
        params = request.params
        self._params = params
        self._detokenizer = detokenizer
        self._stops = StopStrings(params.stop, params.include_stop)
        self._stop_ids = frozenset(params.stop_token_ids)
        self._eos = frozenset() if params.ignore_eos else eos_token_ids
        self._limit = min(params.max_tokens, max_len - len(request.prompt_token_ids))
        self._num_tokens = 0

    def push(self, token_id: int) -> Progress:
        """Accounts for the next token. A token that ends the output adds no text of its own."""
        self._num_tokens += 1
        may_stop = self._num_tokens > self._params.min_tokens
        if may_stop and token_id in self._eos:
            return Progress(self._rest(), FinishReason.STOP)
        if may_stop and token_id in self._stop_ids:
            own = self._detokenizer.push(token_id) if self._params.include_stop else ""
            return Progress(self._through(own) + self._rest(), FinishReason.STOP, token_id)
        text = self._detokenizer.push(token_id)
        passed = self._stops.push(text) if may_stop else text
        if isinstance(passed, StopMatch):
            return Progress(passed.text, FinishReason.STOP, passed.stop)
        if self._num_tokens >= self._limit:
            tail = self._stops.push(self._detokenizer.flush()) if may_stop else self._detokenizer.flush()
            if isinstance(tail, StopMatch):
                return Progress(passed + tail.text, FinishReason.STOP, tail.stop)
            return Progress(passed + tail + self._stops.flush(), FinishReason.LENGTH)
        return Progress(passed)

    def push_run(self, token_ids: Sequence[int]) -> str:
        """Accounts for several tokens of which none can end the output; returns their text. See `can_run`."""
        self._num_tokens += len(token_ids)
        return "".join([self._detokenizer.push(token_id) for token_id in token_ids])

    @property
    def can_run(self) -> int:
        """So many tokens may come at once without a look at each: none of them could be the last one."""
        if self._eos or self._stop_ids or self._params.stop or self._num_tokens < self._params.min_tokens:
            return 0
        return max(0, self._limit - 1 - self._num_tokens)

    def _through(self, text: str) -> str:
        passed = self._stops.push(text)
        return passed.text if isinstance(passed, StopMatch) else passed

    def _rest(self) -> str:
        return self._through(self._detokenizer.flush()) + self._stops.flush()
