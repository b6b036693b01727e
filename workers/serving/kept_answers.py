"""Answers that have ended and that whoever had them has, kept for a while for routers that ask for them by their job. Decides which go."""

from __future__ import annotations

from math import inf

from workers.serving.served_request import ServedRequest
from workers.shares import Shares


class KeptAnswers:
    """Each is kept for `keep_s`, and all together take at most `max_bytes`, about; where they would take more, the oldest go of the
    owner that has most. `now` is what its owner says it is."""

    def __init__(self, keep_s: float = 0.0, max_bytes: int = 0) -> None:
        self._keep_s = keep_s
        self._max_bytes = max_bytes
        self._answers: dict[int, tuple[ServedRequest, float]] = {}
        """By sequence id, the oldest first: with when it came."""
        self._shares: Shares[int, int] = Shares(max_bytes)
        self.now = 0.0

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def num_bytes(self) -> int:
        return self._shares.total

    def add(self, served: ServedRequest) -> list[ServedRequest]:
        """Returns those that are to be dropped for it; it may be one of them."""
        if served.job is None or not self._keep_s:
            return [served]
        served.merge()
        num_bytes = served.num_bytes
        if num_bytes > self._max_bytes:
            return [served]
        self._answers[served.sequence_id] = served, self.now
        self._shares.add(served.sequence_id, served.job.owner, num_bytes)
        return [self._answers[number][0] for number in self._shares.take_surplus()]

    def remove(self, served: ServedRequest) -> None:
        """It is somebody's again, or gone."""
        self._answers.pop(served.sequence_id, None)
        self._shares.remove(served.sequence_id)

    @property
    def next_due_s(self) -> float:
        oldest = next(iter(self._answers.values()), None)
        return inf if oldest is None else oldest[1] + self._keep_s

    def expired(self, now: float) -> list[ServedRequest]:
        """Those that have been kept long enough."""
        found = []
        for served, came_s in self._answers.values():
            if came_s + self._keep_s > now:
                break
            found.append(served)
        return found
