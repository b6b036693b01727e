"""What happened lately, for operators: the way of each request, and faults with what came of them. Bounded; decides nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

MAX_STEPS = 32
"""Of one request; of more the first and the last are kept."""
MAX_ENDED = 512
"""Requests that have ended."""
MAX_FAULTS = 200
MAX_COUNTED = 4096
"""Requests in flight that are counted by age, the oldest first; those behind are younger than the last of them."""
NUM_OLDEST = 50
AGES_S = (1.0, 5.0, 30.0, 120.0, 600.0)
"""Upper ends of the classes of age; the last class has none."""


class Step(NamedTuple):
    """`at_s` by the router's clock; `why` is empty where there is nothing to say."""

    at_s: float
    what: str
    worker_id: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Way:
    """Where a request has been. `ended` is empty while it is in flight; times by the router's clock."""

    request_id: str
    tenant: str
    arrived_s: float
    num_prompt_tokens: int
    cached_tokens: int
    num_tokens: int
    """That its client has."""
    num_attempts: int
    decode_worker: str
    prefill_worker: str
    state: str
    """waiting, prefill, decode, moving; of one that has ended: ended."""
    ended: str
    steps: tuple[Step, ...]


class Incident(NamedTuple):
    at_s: float
    what: str
    worker_id: str
    is_recovery: bool


def note(steps: list[Step], step: Step) -> None:
    """Adds a step to a request's own list."""
    if len(steps) >= MAX_STEPS:
        del steps[MAX_STEPS // 2]
    steps.append(step)


class Journal:
    """Of one router."""

    def __init__(self) -> None:
        self._ended: dict[str, Way] = {}
        self._faults: deque[Incident] = deque(maxlen=MAX_FAULTS)

    def end(self, way: Way) -> None:
        self._ended.pop(way.request_id, None)
        self._ended[way.request_id] = way
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    def fault(self, now: float, what: str, worker_id: str = "", is_recovery: bool = False) -> None:
        self._faults.append(Incident(now, what, worker_id, is_recovery))

    def faults(self) -> tuple[Incident, ...]:
        """The newest first."""
        return tuple(reversed(self._faults))

    def ended(self) -> Iterator[Way]:
        """The newest first."""
        return reversed(self._ended.values())


def by_age(arrivals_s: Iterable[float], num_in_flight: int, now: float) -> tuple[int, ...]:
    """How many requests are in each class of AGES_S, and beyond. `arrivals_s` in the order of arrival."""
    counts = [0] * (len(AGES_S) + 1)
    place, counted = len(AGES_S), 0
    for arrived_s in islice(arrivals_s, MAX_COUNTED):
        while place and now - arrived_s <= AGES_S[place - 1]:
            place -= 1
        counts[place] += 1
        counted += 1
    counts[place if counted else 0] += num_in_flight - counted
    return tuple(counts)


def is_called(request_id: str, asked: str) -> bool:
    """Whether an operator may mean this request: by its own id, or by that of the answer that it is a part of."""
    job = asked.removeprefix("chatcmpl-").removeprefix("cmpl-").removeprefix("resp_").removeprefix("msg_")
    return request_id == job or (len(job) >= 8 and request_id.startswith(job))
