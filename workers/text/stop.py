"""Cuts a text stream at the first stop string and holds back what may become one; knows text only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


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
