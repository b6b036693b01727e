"""Cuts a text stream at the first stop string and holds back what may become one; knows text only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """`text` is what may still be delivered before the end; `stop` the string that matched."""

    text: str
    stop: str


class StopStrings:
    """Feeds on text deltas; what it lets through is a pure function of the text so far."""

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include_stop
        self._held = ""

    def push(self, text: str) -> str | StopMatch:
        """The text that is certain not to belong to a stop string, or the match that ends the stream.

        The earliest match wins; of several at one place, the longest.
        """
        if not self._stops:
            return text
        pending = self._held + text
        found = [(pending.find(stop), -len(stop), stop) for stop in self._stops if stop in pending]
        if found:
            start, negative_length, stop = min(found)
            return StopMatch(pending[: start - negative_length if self._include else start], stop)
        keep = self._possible_beginning(pending)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def flush(self) -> str:
        """What was held back, when the stream ends for another reason."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that is a proper beginning of a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
