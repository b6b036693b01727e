"""Has sequences decode in turns where all of them in one step would hold the short ones up for long. Knows no clock and no blocks."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

from workers.scheduler.sequence import Sequence

_SEQUENCE_TOKENS = 256
"""A sequence in a step takes about as long as so many tokens before it."""
_LASTS = 128
"""After so many steps a small one is too long ago to say what a step takes with little in it."""
_LARGER = 1.5
"""So many times as much must be in a step as in a small one to tell from both what it takes."""
_ALIKE = 1.1
_SMALL = 1 / 8
"""A step that is to be a small one gets this part of all."""
_SHORT = 1 / 4
"""Sequences that take so much of what all take on average decode in every step."""
_PROBE = 2 * _LARGER
"""Where steps were not different enough lately to learn from, one takes so many times as much as a small one."""


class _Step(NamedTuple):
    load: float
    """Tokens before those that decoded in it, and _SEQUENCE_TOKENS for each."""
    took_s: float


class DecodeTurns:
    """A step that only decodes takes so long whatever is in it, and so long for each token before those that decode.

    What is in it takes at most what `max_pause_s` leaves of a step, or as long as a step takes anyway, if that is longer: a model
    that needs a second for any step would otherwise decode one sequence at a time. Sequences that take an even share or less decode
    in every step, the others in turns, those first that have waited longest; where none is short beside the others, a turn that one
    misses is worth as much as the step that all have shorter, and all decode. What a step takes is learnt from steps with much and
    with little in them. So one in _LASTS is made small where steps take longer than they may and there was no small one, and one in
    _LASTS larger than the others where all were small: what was learnt from a step that something else held up is forgotten so.
    """

    def __init__(self, max_pause_s: float) -> None:
        self._max_pause_s = max_pause_s
        self._small: _Step | None = None
        """The smallest step lately."""
        self._small_age = 0
        self._rate: float | None = None
        """Seconds for each token. None: no two steps were different enough."""
        self._rate_age = 0
        """Steps since it was learnt."""
        self._last_s = 0.0
        self._number = 0
        """Of the last step."""

    def took(self, step_s: float, num_decodes: int, context: int) -> None:
        """A step without prompts ended: how many sequences decoded in it, and how many tokens stood before them."""
        load, small = context + _SEQUENCE_TOKENS * num_decodes, self._small
        self._last_s = step_s
        self._small_age += 1
        self._rate_age += 1
        if small is None or load <= small.load or self._small_age > _LASTS:
            self._small, self._small_age = _Step(load, step_s), 0
        elif load <= _ALIKE * small.load:
            self._small, self._small_age = _Step(small.load, (small.took_s + step_s) / 2), 0
        elif load >= _LARGER * small.load:
            rate = max(0.0, (step_s - small.took_s) / (load - small.load))
            # A step may have been held up by something else, but none takes less than it must.
            self._rate = rate if self._rate is None else min(rate, (self._rate + rate) / 2)
            self._rate_age = 0

    def choose(self, decoding: list[Sequence]) -> list[Sequence]:
        """Of those that could decode in a step, those that shall, in the same order."""
        small, is_late = self._small, self._last_s > self._max_pause_s
        if math.isinf(self._max_pause_s) or len(decoding) < 2 or small is None:
            return decoding
        rate = self._rate or 0.0
        loads = [sequence.num_computed + _SEQUENCE_TOKENS for sequence in decoding]
        load = sum(loads)
        if min(loads) * len(loads) > _SHORT * load:
            return decoding
        step_s = max(0.0, small.took_s - rate * small.load)
        most_s, all_s = max(self._max_pause_s - step_s, step_s), rate * load
        needs_small = self._small_age >= _LASTS or (self._rate is None and load < _LARGER * small.load)
        if needs_small and (all_s > most_s or is_late):
            return self._within(load * _SMALL, decoding, loads)
        if all_s <= most_s:
            return decoding
        least = _PROBE * small.load if self._rate_age >= _LASTS else 0.0
        return self._within(max(most_s / rate, least), decoding, loads)

    def _within(self, most: float, decoding: list[Sequence], loads: list[int]) -> list[Sequence]:
        """Short ones, and of the others as many as there is room for, at least one."""
        short = max(most, sum(loads) * _SHORT) / len(loads)
        chosen = {place for place, load in enumerate(loads) if load <= short}
        left = most - sum([loads[place] for place in chosen])
        in_turn = sorted(
            (place for place in range(len(loads)) if place not in chosen),
            key=lambda place: (decoding[place].last_turn, place),
        )
        for number, place in enumerate(in_turn):
            left -= loads[place]
            if left < 0 and number:
                break
            chosen.add(place)
        return [decoding[place] for place in sorted(chosen)]

    def give(self, decoding: Collection[Sequence]) -> None:
        """These decode in the step that was just decided."""
        self._number += 1
        for sequence in decoding:
            sequence.last_turn = self._number
