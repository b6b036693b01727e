"""Finds the least number of workers that keeps its targets, and their split, by asking what a cluster would do. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

MAX_SPLITS = 9
"""Tried for one number of workers, mixed ones aside."""


@dataclass(frozen=True, slots=True, order=True)
class Split:
    """How many workers have which role."""

    prefill: int = 0
    decode: int = 0
    mixed: int = 0

    @property
    def num_workers(self) -> int:
        return self.prefill + self.decode + self.mixed

    def __str__(self) -> str:
        parts = ((self.prefill, "prefill"), (self.decode, "decode"), (self.mixed, "mixed"))
        return " + ".join(f"{count} {name}" for count, name in parts if count)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulated cluster did. Shares from 0 to 1, times in seconds; None: no request had such a time."""

    split: Split
    good_share: float
    goodput_per_s: float
    ttft_p90_s: float | None
    tpot_p90_s: float | None
    busy: float
    """Of all workers, the share of the time in which a step ran."""
    cached_share: float = 0.0


Evaluate = Callable[[Sequence[Split]], list[Outcome]]
"""Outcomes in the order of the splits; it may run several at once."""


@dataclass(slots=True)
class Search:
    """Bisection over the number of workers; each number has the best of its splits. What was asked once is not asked again."""

    evaluate: Evaluate
    share: float
    """Of the requests, that must be good."""
    max_workers: int
    known: dict[Split, Outcome] = field(default_factory=dict)

    def least(self, first: int) -> Outcome | None:
        """The best outcome with the fewest workers that reach the share; None: none does, up to `max_workers`.

        More workers are taken to be no worse. `first` is where the search begins.
        """
        enough = max(1, min(first, self.max_workers))
        too_few = 0
        while self.best(enough).good_share < self.share:
            if enough == self.max_workers:
                return None
            too_few, enough = enough, min(self.max_workers, enough * 2)
        while enough - too_few > 1:
            middle = (enough + too_few) // 2
            if self.best(middle).good_share < self.share:
                too_few = middle
            else:
                enough = middle
        return self.best(enough)

    def best(self, num_workers: int) -> Outcome:
        """Of the splits of so many workers: the most good requests, then the faster first token."""
        tried = self._ask(splits(num_workers))
        top = max(tried, key=_merit)
        if top.split.prefill:
            near = [Split(top.split.prefill + step, top.split.decode - step) for step in (-1, 1)]
            top = max([top, *self._ask([split for split in near if split.prefill and split.decode])], key=_merit)
        return top

    def lost(self, split: Split) -> list[tuple[str, Outcome]]:
        """The same cluster without one worker of each role that can be missed."""
        fewer = {
            "prefill": Split(split.prefill - 1, split.decode, split.mixed) if split.prefill else None,
            "decode": Split(split.prefill, split.decode - 1, split.mixed) if split.decode else None,
            "mixed": Split(split.prefill, split.decode, split.mixed - 1) if split.mixed else None,
        }
        able = {role: left for role, left in fewer.items() if left is not None and _works(left)}
        return list(zip(able, self._ask(list(able.values())), strict=True))

    def _ask(self, wanted: Sequence[Split]) -> list[Outcome]:
        new = [split for split in dict.fromkeys(wanted) if split not in self.known]
        for split, outcome in zip(new, self.evaluate(new) if new else [], strict=True):
            self.known[split] = outcome
        return [self.known[split] for split in wanted]

    def curve(self) -> list[Outcome]:
        """The best that was found for each number of workers, fewest first."""
        best: dict[int, Outcome] = {}
        for outcome in self.known.values():
            count = outcome.split.num_workers
            if count not in best or _merit(outcome) > _merit(best[count]):
                best[count] = outcome
        return [best[count] for count in sorted(best)]

    def splits_of(self, num_workers: int) -> list[Outcome]:
        """All that was asked of so many workers, mixed ones first, then by the number that prefills."""
        return sorted(
            (outcome for split, outcome in self.known.items() if split.num_workers == num_workers),
            key=lambda outcome: outcome.split,
        )


def splits(num_workers: int) -> list[Split]:
    """All mixed, and prefill to decode in steps that are even, at most MAX_SPLITS of them."""
    counts = range(1, num_workers)
    if len(counts) > MAX_SPLITS:
        counts_tried = sorted({round(1 + (num_workers - 2) * at / (MAX_SPLITS - 1)) for at in range(MAX_SPLITS)})
    else:
        counts_tried = list(counts)
    return [Split(mixed=num_workers), *(Split(count, num_workers - count) for count in counts_tried)]


def _works(split: Split) -> bool:
    return split.prefill + split.mixed > 0 and split.decode + split.mixed > 0


def _merit(outcome: Outcome) -> tuple[float, float]:
    return round(outcome.good_share, 4), -(outcome.ttft_p90_s if outcome.ttft_p90_s is not None else float("inf"))
