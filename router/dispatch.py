"""Puts one request on a worker: asks the policy for a route, keeps the books of what was sent, writes the Submit."""

from __future__ import annotations

from router.charges import Charge
from router.config import RouterConfig
from router.events import Send
from router.fleet import Fleet
from router.policies.policy import Demand, Policy, Route, WorkerSnapshot
from router.prefix_index import PrefixIndex
from router.progress import Flight
from router.view import WorkerEntry
from workers.client import Migration, Submit
from workers.errors import InvariantViolated
from workers.status import PrefixHint


class Dispatcher:
    """Routes requests over a fleet, within the bounds of `config`."""

    def __init__(self, policy: Policy, fleet: Fleet, index: PrefixIndex, config: RouterConfig) -> None:
        self._policy = policy
        self._fleet = fleet
        self._index = index
        self._expected_output_tokens = config.expected_output_tokens
        self._pull_min_blocks = config.pull_min_blocks
        self._request_timeout_s = config.request_timeout_s
        self._first_token_deadline_s = config.first_token_deadline_s

    def route(self, flight: Flight) -> Route | None:
        """Where the request would go now; None: nowhere."""
        snapshots = [self._snapshot(entry, flight) for entry in self._fleet if entry.takes_requests]
        return self._policy.route(self._demand(flight), snapshots)

    def submit(self, flight: Flight, route: Route, now: float) -> Send:
        """Begins the request's next attempt."""
        decode = self._fleet.get(route.decode)
        if decode is None or decode.connection is None:
            raise InvariantViolated(f"the policy chose {route.decode}, which takes no requests")
        flight.begin_attempt(route)
        self._charge(flight, decode, now)
        prefillers = [self._fleet.get(worker_id) for worker_id in route.prefill]
        addresses = tuple(entry.current_address() for entry in prefillers if entry is not None)
        remaining_s, first_token_s = self._time_left(flight, now)
        submit = Submit(
            flight.attempt_request(flight.wire_id),
            decode.generation,
            addresses,
            remaining_s,
            first_token_s,
            prefix=self._prefix_hint(flight),
            name=flight.request.request_id,
        )
        return Send(decode.worker_id, decode.connection, submit)

    def submit_migration(self, flight: Flight, source: WorkerEntry, target: WorkerEntry, now: float) -> Send:
        """Begins a second attempt, which takes the running one over from `source`."""
        if target.connection is None:
            raise InvariantViolated(f"a request shall move to {target.worker_id}, which has no stream")
        running = Migration(source.current_address(), flight.wire_id)
        incoming = flight.begin_migration(target.worker_id, now)
        target.charges.add(incoming.wire_id, Charge(now, 1, self.num_blocks(flight)))
        remaining_s, _ = self._time_left(flight, now)
        request = flight.attempt_request(incoming.wire_id)
        name = flight.request.request_id
        submit = Submit(request, target.generation, remaining_s=remaining_s, migration=running, name=name)
        return Send(target.worker_id, target.connection, submit)

    def num_blocks(self, flight: Flight) -> int:
        """KV blocks that the request is taken to need in the end."""
        return self._demand(flight).num_blocks

    def release(self, flight: Flight) -> None:
        """The workers' own reports contain the request by now, or it has ended."""
        for worker_id in (flight.worker_id, flight.prefill_worker_id):
            self.release_from(worker_id, flight.wire_id)

    def release_from(self, worker_id: str, wire_id: str) -> None:
        """As `release`, for one attempt on one worker."""
        entry = self._fleet.get(worker_id)
        if entry is not None and entry.charges:
            entry.charges.release(wire_id)

    def _prefix_hint(self, flight: Flight) -> PrefixHint | None:
        """Who holds more of the prompt than the worker that is to compute it, if the difference is worth the effort."""
        if not self._pull_min_blocks:
            return None
        own = self._index.match(flight.prefill_worker_id, flight.hashes)
        holder, most = None, own + self._pull_min_blocks - 1
        for entry in self._fleet:
            if entry.takes_requests and entry.worker_id != flight.prefill_worker_id:
                count = self._index.match_pool(entry.worker_id, flight.hashes)
                if count > most:
                    holder, most = entry, count
        return PrefixHint(holder.current_address(), most) if holder is not None else None

    def _time_left(self, flight: Flight, now: float) -> tuple[float, float]:
        """Until the request's end and until its first token; 0 means no bound, so what has passed counts as nearly nothing."""
        age_s = now - flight.arrived_s
        due_s = 0.0
        if self._first_token_deadline_s and not flight.is_started:
            due_s = max(1e-3, self._first_token_deadline_s - age_s)
        return max(1e-3, self._request_timeout_s - age_s), due_s

    def _demand(self, flight: Flight) -> Demand:
        model = self._fleet.model
        if model is None:
            raise InvariantViolated("a request was admitted before any worker had reported")
        num_left = flight.request.params.max_tokens - len(flight.delivered)
        return Demand(
            key=str(flight.hashes[0]) if flight.hashes else flight.request.request_id,
            num_prompt_tokens=len(flight.request.prompt_token_ids),
            num_output_tokens=len(flight.delivered) + max(1, min(num_left, self._expected_output_tokens)),
            block_size=model.block_size,
        )

    def _snapshot(self, entry: WorkerEntry, flight: Flight) -> WorkerSnapshot:
        load, charges = entry.load, entry.charges
        cached = self._index.match(entry.worker_id, flight.hashes)
        num_reported = load.num_running + load.num_waiting + load.num_transferring
        return WorkerSnapshot(
            worker_id=entry.worker_id,
            can_decode=entry.can_decode,
            can_prefill=entry.can_prefill,
            num_sequences=num_reported + charges.num_sequences,
            prefill_tokens=load.waiting_prefill_tokens + charges.prefill_tokens,
            free_blocks=load.num_free_blocks - charges.num_blocks,
            cached_blocks=cached,
            lower_blocks=cached - self._index.match_pool(entry.worker_id, flight.hashes),
            avoid=entry.worker_id == flight.avoid_worker_id,
        )

    def _charge(self, flight: Flight, decode: WorkerEntry, now: float) -> None:
        """Counts the request on its workers, and keeps its cached blocks longest in the index."""
        demand = self._demand(flight)
        prefill = self._fleet.get(flight.prefill_worker_id) or decode
        cached = self._index.match(prefill.worker_id, flight.hashes)
        num_tokens = max(1, demand.num_prompt_tokens - cached * demand.block_size)
        if prefill is decode:
            decode.charges.add(flight.wire_id, Charge(now, 1, demand.num_blocks, num_tokens))
        else:
            decode.charges.add(flight.wire_id, Charge(now, 1, demand.num_blocks))
            prefill.charges.add(flight.wire_id, Charge(now, prefill_tokens=num_tokens))
            self._index.touch(prefill.worker_id, flight.hashes)
        self._index.touch(decode.worker_id, flight.hashes)
