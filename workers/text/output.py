"""Turns one request's drawn tokens into text, cuts it at stop strings and decides when it ends; knows no logits and no scheduler."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from workers.request import FinishReason, Request


@dataclass(frozen=True, slots=True)
class StopMatch:
    """`text` is what may still be delivered before the end; `stop` the string that matched."""

    text: str
    stop: str


class StopStrings:
    """Feeds on text deltas; what it lets through is a pure function of the text so far.

    A character costs the same however many stop strings there are.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._automaton = _automaton(tuple(stops)) if stops else None
        self._include = include_stop
        self._state = 0
        self._held = ""

    def push(self, text: str) -> str | StopMatch:
        """The text that is certain not to belong to a stop string, or the match that ends the stream.

        The earliest match wins; of several at one place, the longest.
        """
        if self._automaton is None:
            return text
        pending = self._held + text
        best: tuple[int, int, str] | None = None
        for end, character in enumerate(text, len(self._held) + 1):
            self._state = self._automaton.step(self._state, character)
            if (stop := self._automaton.stops[self._state]) is not None:
                found = (end - len(stop), -len(stop), stop)
                best = found if best is None else min(best, found)
        if best is not None:
            start, negative_length, stop = best
            return StopMatch(pending[: start - negative_length if self._include else start], stop)
        certain = len(pending) - self._automaton.lengths[self._state]
        self._held = pending[certain:]
        return pending[:certain]

    def flush(self) -> str:
        """What was held back, when the stream ends for another reason."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """Says after each character which is the longest end of the text that begins a stop string (Aho and Corasick 1975).

    State 0 is the empty text. `lengths` are those of the states' texts; `stops` the longest stop string that a state's text
    ends in, if any.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: dict[tuple[int, str], int] = {}
        self._shorter = [0]
        self.lengths = [0]
        self.stops: list[str | None] = [None]
        children: list[list[tuple[str, int]]] = [[]]
        for stop in stops:
            state = 0
            for character in stop:
                follower = self._next.setdefault((state, character), len(self.lengths))
                if follower == len(self.lengths):
                    children[state].append((character, follower))
                    children.append([])
                    self._shorter.append(0)
                    self.lengths.append(self.lengths[state] + 1)
                    self.stops.append(None)
                state = follower
            self.stops[state] = stop
        waiting = deque(follower for _, follower in children[0])
        while waiting:  # by length: what a state falls back to is shorter, and finished
            state = waiting.popleft()
            for character, follower in children[state]:
                self._shorter[follower] = self.step(self._shorter[state], character)
                if self.stops[follower] is None:
                    self.stops[follower] = self.stops[self._shorter[follower]]
                waiting.append(follower)

    def step(self, state: int, character: str) -> int:
        while (follower := self._next.get((state, character))) is None:
            if state == 0:
                return 0
            state = self._shorter[state]
        return follower


@lru_cache(maxsize=16)
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    """Kept for the choices of one request, which have the same stop strings."""
    return _Automaton(stops)


class Detokenizer(Protocol):
    """Text that became certain with each token; what is pushed and flushed adds up to the decoded tokens."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(slots=True)
class TokenText:
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
        self._eos = frozenset() if params.ignore_eos and not params.grammar else eos_token_ids
        self._limit = min(params.max_tokens, max_len - len(request.prompt_token_ids))
        self._num_tokens = 0

    def push(self, token_id: int) -> TokenText:
        """Accounts for the next token. A token that ends the output adds no text of its own."""
        self._num_tokens += 1
        may_stop = self._num_tokens > self._params.min_tokens
        # Where a grammar has to end the output ends, whatever else was asked for.
        if token_id in self._eos and (may_stop or self._params.grammar):
            return TokenText(self._rest(), FinishReason.STOP)
        if may_stop and token_id in self._stop_ids:
            own = self._detokenizer.push(token_id) if self._params.include_stop else ""
            return TokenText(self._through(own) + self._rest(), FinishReason.STOP, token_id)
        text = self._detokenizer.push(token_id)
        passed = self._stops.push(text) if may_stop else text
        if isinstance(passed, StopMatch):
            return TokenText(passed.text, FinishReason.STOP, passed.stop)
        if self._num_tokens >= self._limit:
            tail = self._stops.push(self._detokenizer.flush()) if may_stop else self._detokenizer.flush()
            if isinstance(tail, StopMatch):
                return TokenText(passed + tail.text, FinishReason.STOP, tail.stop)
            return TokenText(passed + tail + self._stops.flush(), FinishReason.LENGTH)
        return TokenText(passed)

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
