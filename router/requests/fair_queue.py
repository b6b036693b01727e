"""Decides whose turn it is among tenants whose requests wait: deficit round robin over the tokens of their predicted work.

Within a tenant `AdmissionQueue` decides. In each round a tenant may have work of QUANTUM_TOKENS times its weight done, and what it went
over that counts against it in the next ones. What it has left it keeps, up to MAX_SAVED rounds' worth: so a tenant that asks for less
than its share waits for nobody else's backlog, also when some of its requests come together. A round ends when all who wait have used
theirs up. Knows neither workers nor limits of rate.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from router.requests.admission import AdmissionQueue

QUANTUM_TOKENS = 2048
MAX_SAVED = 16


@dataclass(slots=True, eq=False)
class _Lane:
    """One tenant. `deficit` is what it may have done before others have their turn, in tokens; not above 0: it has had its own."""

    tenant: str
    share: float
    """Tokens of a round."""
    deficit: float
    at_once: float = 0.0
    """Tokens taken since others last had a chance."""
    queue: AdmissionQueue = field(default_factory=AdmissionQueue)

    @property
    def most(self) -> float:
        return MAX_SAVED * self.share


_Lanes = OrderedDict[str, _Lane]


class FairQueue:
    """At most `max_queue` new requests; one that is put back after a fault was admitted before, and their number is bounded by the
    requests that run. Taking the next one costs the same however many wait; a round's end looks at each tenant that does not have
    everything saved that it may.
    """

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._lanes: dict[str, _Lane] = {}
        """All that are here, or have less saved than they may."""
        self._back: _Lanes = OrderedDict()
        """Those with requests that had none for a while and are within their share: they go first, a round's share each."""
        self._turn: _Lanes = OrderedDict()
        """Those with requests that have something left of the round."""
        self._spent: _Lanes = OrderedDict()
        """Those with requests that wait for the next one."""
        self._placed: dict[str, tuple[_Lane, float]] = {}
        """By waiting request: its lane, and what it takes of its tenant's share."""

    def __len__(self) -> int:
        return len(self._placed)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._placed

    def is_full(self, tenant: str) -> bool:
        """Whether a new request of the tenant has no place. A tenant with a name takes at most as many places as it leaves free, so
        that one that floods the queue keeps nobody else out."""
        num_free = self._max_queue - len(self._placed)
        lane = self._lanes.get(tenant)
        return num_free <= 0 or (bool(tenant) and lane is not None and len(lane.queue) >= num_free)

    def ids(self) -> list[str]:
        """All waiting requests, in no particular order."""
        return list(self._placed)

    def push(
        self,
        request_id: str,
        priority: int,
        order: int,
        ready_s: float = 0.0,
        due_s: float = 0.0,
        patient_until_s: float = 0.0,
        late_s: float | None = None,
        *,
        tenant: str = "",
        weight: float = 1.0,
        num_tokens: float = 0.0,
    ) -> None:
        """As `AdmissionQueue.push`. `num_tokens` of work count against the tenant's share when the request is taken."""
        lane, share = self._lanes.get(tenant), QUANTUM_TOKENS * weight
        if lane is None:
            lane = self._lanes[tenant] = _Lane(tenant, share, MAX_SAVED * share)
        lane.share = share
        if not len(lane.queue):
            (self._back if lane.deficit > 0 else self._spent)[tenant] = lane
        self._placed[request_id] = (lane, num_tokens)
        lane.queue.push(request_id, priority, order, ready_s, due_s, patient_until_s, late_s)

    def first(self, now: float) -> str | None:
        """The request to run next; it stays in the queue."""
        request_id = self._first_with_turn(now)
        if request_id is None and self._spent and self._end_round(now):
            request_id = self._first_with_turn(now)
        return request_id

    def take(self, request_id: str) -> None:
        """Takes out what goes to a worker: it counts against its tenant."""
        lane, num_tokens = self._placed[request_id]
        lane.deficit -= num_tokens
        self.remove(request_id)
        if not len(lane.queue):
            return
        lane.at_once += num_tokens
        if lane.deficit <= 0:
            self._leave(lane)
            self._spent[lane.tenant] = lane
        elif lane.at_once >= lane.share:
            lane.at_once = 0.0
            (self._back if lane.tenant in self._back else self._turn).move_to_end(lane.tenant)

    def remove(self, request_id: str) -> None:
        """Takes a request out that nobody waits for any more; one that is not here is ignored."""
        placed = self._placed.pop(request_id, None)
        if placed is None:
            return
        lane = placed[0]
        lane.queue.remove(request_id)
        if not len(lane.queue):
            self._leave(lane)
            if lane.deficit >= lane.most:
                del self._lanes[lane.tenant]

    def _leave(self, lane: _Lane) -> None:
        lane.at_once = 0.0
        for lanes in (self._back, self._turn, self._spent):
            lanes.pop(lane.tenant, None)

    def _first_with_turn(self, now: float) -> str | None:
        for lanes in (self._back, self._turn):
            for _ in range(len(lanes)):
                tenant, lane = next(iter(lanes.items()))
                request_id = lane.queue.first(now)
                if request_id is not None:
                    return request_id
                lanes.move_to_end(tenant)  # its requests are not ready yet
        return None

    def _end_round(self, now: float) -> bool:
        """As many rounds pass as it takes until somebody who is ready has a turn; False when nobody is ready."""
        ready = [lane for lane in self._spent.values() if lane.queue.first(now) is not None]
        if not ready:
            return False
        num_rounds = min(math.floor(-lane.deficit / lane.share) + 1 for lane in ready)
        for lane in list(self._lanes.values()):
            lane.deficit = min(lane.most, lane.deficit + num_rounds * lane.share)
            if lane.deficit >= lane.most and not len(lane.queue):
                del self._lanes[lane.tenant]
        for lane in [lane for lane in self._spent.values() if lane.deficit > 0]:
            del self._spent[lane.tenant]
            self._turn[lane.tenant] = lane
        return True
