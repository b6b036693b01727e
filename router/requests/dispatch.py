"""Puts one request on a worker: asks the policy for a route, keeps the books of what was sent, writes the Submit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xxhash

from router.config import RouterConfig
from router.events import SendMessage
from router.fleet.fleet import Fleet
from router.fleet.prefix_index import Prefixes, PrefixIndex
from router.fleet.worker_entry import Charge, WorkerEntry
from router.fleet.worker_table import ANYTHING, Flags
from router.forecast.forecasts import Forecasts
from router.policies.explain import Decision, explain
from router.policies.outlook import Outlook
from router.policies.policy import Candidates, Demand, Policy, Route
from router.policies.promise import Promise, WaitingLine, promise
from router.requests.in_flight import InFlightRequest
from workers.errors import InvariantViolated
from workers.request import Output
from workers.status import PrefixHint
from workers.trust.permits import make_key, make_permit
from workers.wire.attach import Adopt, Migration, Submit

UNBOUND_LOCAL_TOKENS = 2048
"""Without a target between two tokens nothing says what answers may lose to a prompt beside them: a DECODE worker computes short ones only."""
MIN_ANSWERS = 20
"""So many first tokens say how well they are foretold."""


class Dispatcher:
    """Routes requests over a fleet, within the bounds of `config`. `secret` is what keys of attempts are made with."""

    def __init__(
        self,
        policy: Policy,
        fleet: Fleet,
        index: PrefixIndex,
        forecasts: Forecasts,
        config: RouterConfig,
        secret: bytes,
    ) -> None:
        self._policy = policy
        self._secret = secret
        self._policy_name = config.policy
        self._fleet = fleet
        self._index = index
        self._forecasts = forecasts
        self._expected_output_tokens = config.expected_output_tokens
        self._pull_min_blocks = config.pull_min_blocks
        self._lower_tier_tokens = config.lower_tier_cost_tokens
        self._max_local_tokens = config.max_local_prefill_tokens
        self._request_timeout_s = config.request_timeout_s
        self._first_token_deadline_s = config.first_token_deadline_s
        self.uncached_share = 1.0
        """Of prompts, as it was lately."""
        self._matched_hashes: list[int] | None = None
        self._matched_key = (-1, -1)
        self._matched = index.match((), 0)

    def route(self, flight: InFlightRequest, now: float) -> Route | None:
        """Where the request would go now; None: nowhere, and the table is told what it waits for."""
        table, demand = self._fleet.table, self._demand(flight, now)
        candidates, reachable, has_room = self._candidates(flight, demand)
        route = self._policy.route(demand, candidates)
        if route is None:
            in_pool = candidates.prefixes.in_pool
            lacks_blocks = bool((reachable & ~has_room).any())
            table.wanted_blocks = demand.num_prompt_blocks - int(in_pool.max(initial=0)) if lacks_blocks else ANYTHING
        return route

    def explain(self, flight: InFlightRequest, route: Route, now: float) -> Decision:
        """Why the route that was found just now is what it is."""
        demand = self._demand(flight, now)
        candidates, _, _ = self._candidates(flight, demand)
        weighed = self._policy.weigh(demand, candidates)
        return explain(self._policy_name, self._fleet.table.ids, route, now - flight.arrived_s, *weighed)

    def promise(self, flight: InFlightRequest, line: WaitingLine, now: float) -> Promise | None:
        """What can be promised to a request that has just come, behind `line`; None: nothing was measured yet."""
        demand = self._demand(flight, now)
        candidates, _, _ = self._candidates(flight, demand)
        table = self._fleet.table
        able = replace(candidates, prefills=table.can_prefill & bool(table.num_prefilling), decodes=table.can_decode)
        if not table.num_prefilling:
            able = replace(able, computes=table.can_decode)
        return promise(Outlook(demand, able), line, self.ttft_scale)

    @property
    def ttft_scale(self) -> float:
        """Measured first tokens over foretold ones, where there are enough to tell."""
        accuracy = self._forecasts.ttft
        return min(3.0, max(0.5, accuracy.middle)) if len(accuracy) >= MIN_ANSWERS else 1.0

    def _candidates(self, flight: InFlightRequest, demand: Demand) -> tuple[Candidates, Flags, Flags]:
        """With the workers that could take it if they had room, and those that have room."""
        table, prefixes = self._fleet.table, self._prefixes(flight)
        has_room = table.can_decode & (table.takes_blocks + prefixes.in_pool >= demand.num_prompt_blocks)
        prefills = table.can_prefill & table.takes_prompt
        # Where nobody can prefill, those that decode compute prompts themselves. A prompt whose tokens are to be scored is
        # computed where its answer is: no prefill worker hands scores over.
        is_scored = flight.request.params.prompt_logprobs is not None
        if is_scored:
            prefills = np.zeros_like(prefills)
        computes = (
            table.takes_prompt & table.can_prefill if table.num_prefilling and not is_scored else table.takes_prompt
        )
        short = np.zeros_like(prefills)
        if self._max_local_tokens and table.num_prefilling and not is_scored:
            num_uncached = demand.num_prompt_tokens - prefixes.cached * demand.block_size
            short = table.can_decode & ~table.can_prefill & table.takes_prompt & table.is_known
            most = self._max_local_tokens if demand.tpot_s else min(self._max_local_tokens, UNBOUND_LOCAL_TOKENS)
            short &= num_uncached <= most
        reachable = table.can_decode & (computes | short | (prefills.sum() > prefills))
        handoffs, lower_tier_tokens = self._forecasts.handoffs, self._lower_tier_tokens
        prices = handoffs.fixed_s, handoffs.block_s, lower_tier_tokens
        return (
            Candidates(table, has_room & reachable, prefills, computes, short, prefixes, *prices),
            reachable,
            has_room,
        )

    def submit(self, flight: InFlightRequest, route: Route, now: float) -> SendMessage:
        """Begins the request's next attempt."""
        decode = self._fleet.at(route.decode)
        prefillers = [self._fleet.at(row) for row in route.prefill]
        if decode.connection is None:
            raise InvariantViolated(f"the policy chose {decode.worker_id}, which takes no requests")
        flight.submitted_s, flight.foretold_ttft_s = now, route.ttft_s
        flight.begin_attempt(decode.worker_id, prefillers[0].worker_id if prefillers else decode.worker_id)
        decode.attempts[flight.wire_id] = None
        hint = self._prefix_hint(flight, prefillers[0] if prefillers else decode)
        self._charge(flight, decode, prefillers[0] if prefillers else decode, now)
        remaining_s, first_token_s = self._time_left(flight, now)
        submit = Submit(
            flight.attempt_request(flight.wire_id),
            decode.generation,
            tuple(entry.current_address() for entry in prefillers),
            remaining_s,
            first_token_s,
            prefix=hint,
            name=flight.name,
            key=self.key_of(flight.wire_id),
            kept=flight.part.kept,
            cached_tokens=flight.cached_tokens,
        )
        return SendMessage(decode.worker_id, decode.connection, submit)

    def take_up(self, flight: InFlightRequest, worker: WorkerEntry, now: float) -> SendMessage:
        """Begins an attempt that has begun already: another router has sent it to `worker`, or had it moved there, which tells it from
        where the client has come to."""
        if worker.connection is None:
            raise InvariantViolated(f"a request shall be taken up at {worker.worker_id}, which has no stream")
        flight.submitted_s, flight.foretold_ttft_s = now, 0.0
        flight.begin_attempt(worker.worker_id, worker.worker_id)
        worker.attempts[flight.wire_id] = None
        adopt = Adopt(flight.name, flight.wire_id, len(flight.delivered), self.key_of(flight.wire_id), joins=True)
        return SendMessage(worker.worker_id, worker.connection, adopt)

    def submit_migration(
        self, flight: InFlightRequest, source: WorkerEntry, target: WorkerEntry, now: float
    ) -> SendMessage:
        """Begins a second attempt, which takes the running one over from `source`."""
        if target.connection is None:
            raise InvariantViolated(f"a request shall move to {target.worker_id}, which has no stream")
        permit = make_permit(self.key_of(flight.wire_id), target.worker_id)
        running = Migration(source.current_address(), flight.wire_id, permit)
        incoming = flight.begin_migration(target.worker_id, now)
        target.attempts[incoming.wire_id] = None
        target.charge(incoming.wire_id, Charge(now, 1, self.num_blocks(flight)))
        remaining_s, _ = self._time_left(flight, now)
        request = flight.attempt_request(incoming.wire_id)
        submit = Submit(
            request,
            target.generation,
            remaining_s=remaining_s,
            migration=running,
            name=flight.name,
            key=self.key_of(incoming.wire_id),
            kept=flight.part.kept,
            cached_tokens=flight.cached_tokens,
        )
        return SendMessage(target.worker_id, target.connection, submit)

    def key_of(self, attempt: str) -> bytes:
        """What permits to take an attempt over are made with."""
        return make_key(self._secret, attempt)

    def ends_s(self, flight: InFlightRequest) -> float:
        """When it must be done, by what the router allows and the client wants."""
        bounds = (self._request_timeout_s, flight.wishes.timeout_s or self._request_timeout_s)
        return flight.arrived_s + min(bounds)

    def predicted_tokens(self, flight: InFlightRequest) -> float:
        """What its tenant's share pays for it: what is not cached of its prompt, as far as that can be told, and its expected answer."""
        request = flight.request
        num_output = min(request.params.max_tokens, self._expected_output_tokens)
        return len(request.prompt_token_ids) * self.uncached_share + num_output

    def lead_s(self, flight: InFlightRequest) -> float:
        """From when it goes to its workers until its first token, as others took lately."""
        return self._forecasts.lead.expect(len(flight.request.prompt_token_ids) * self.uncached_share)

    def num_blocks(self, flight: InFlightRequest) -> int:
        """KV blocks that the request is taken to need in the end."""
        return self._demand(flight).num_blocks

    def release(self, flight: InFlightRequest) -> None:
        """The workers' own reports contain the request by now."""
        for worker_id in {flight.worker_id, flight.prefill_worker_id}:
            entry = self._fleet.get(worker_id)
            if entry is not None:
                entry.release(flight.wire_id)

    def end(self, worker_id: str, wire_id: str) -> None:
        """An attempt does not decode there any more."""
        entry = self._fleet.get(worker_id)
        if entry is not None:
            entry.end_attempt(wire_id)

    def note_running(self, flight: InFlightRequest) -> None:
        """The running attempt is on a worker that may have to be left by now."""
        entry = self._fleet.get(flight.worker_id)
        if entry is not None:
            self._fleet.note_must_move(entry)

    def _prefixes(self, flight: InFlightRequest) -> Prefixes:
        """What each worker caches of the prompt; found once for all that is asked of one request, and for its other choices."""
        key = (self._index.version, len(self._fleet.table))
        if self._matched_hashes is not flight.hashes or self._matched_key != key:
            self._matched = self._index.match(flight.hashes, len(self._fleet.table))
            self._matched_hashes, self._matched_key = flight.hashes, key
        return self._matched

    def _prefix_hint(self, flight: InFlightRequest, computes: WorkerEntry) -> PrefixHint | None:
        """Who holds more of the prompt than the worker that is to compute it, if the difference is worth the effort."""
        if not self._pull_min_blocks or not flight.hashes:
            return None
        table, prefixes = self._fleet.table, self._prefixes(flight)
        held = np.where(table.can_decode | table.can_prefill, prefixes.in_pool, 0)
        held[computes.row] = 0
        holder = int(held.argmax())
        num_blocks = int(held[holder])
        if num_blocks < int(prefixes.cached[computes.row]) + self._pull_min_blocks:
            return None
        return PrefixHint(self._fleet.at(holder).current_address(), num_blocks)

    def _time_left(self, flight: InFlightRequest, now: float) -> tuple[float, float]:
        """Until the request's end and until its first token; 0 means no bound, so what has passed counts as nearly nothing."""
        age_s = now - flight.arrived_s
        due_s = 0.0
        bounds = [bound_s for bound_s in (self._first_token_deadline_s, flight.wishes.ttft_s) if bound_s]
        if bounds and not flight.is_started:
            due_s = max(1e-3, min(bounds) - age_s)
        return max(1e-3, self.ends_s(flight) - now), due_s

    def note_answer(self, flight: InFlightRequest, output: Output, now: float) -> None:
        """A first output has come: what it says of the times that were foretold."""
        if flight.num_attempts == 1 and not flight.is_taken_up:  # what is taken up has been computed already
            self._forecasts.lead.note(
                len(flight.request.prompt_token_ids) * self.uncached_share, now - flight.submitted_s
            )
        if output.handoff is None:
            return
        report, decode = output.handoff, self._fleet.get(flight.worker_id)
        if report.transport != "local" and decode is not None and decode.status is not None:
            num_blocks = report.kv_bytes // max(1, decode.status.kv_block_bytes)
            self._forecasts.handoffs.note(num_blocks, report.exposed_s)
        if flight.foretold_ttft_s and report.attempts == 1 and flight.num_attempts == 1:
            self._forecasts.ttft.note(flight.foretold_ttft_s, now - flight.submitted_s)

    def _demand(self, flight: InFlightRequest, now: float | None = None) -> Demand:
        """`now` None: whatever is left of the time until the first token is due."""
        model = self._fleet.model
        if model is None:
            raise InvariantViolated("a request was admitted before any worker had reported")
        num_left = flight.request.params.max_tokens - len(flight.delivered)
        avoid, wishes = self._fleet.get(flight.avoid_worker_id), flight.wishes
        return Demand(
            key=flight.hashes[0] if flight.hashes else xxhash.xxh3_64_intdigest(flight.request.request_id.encode()),
            num_prompt_tokens=len(flight.request.prompt_token_ids),
            num_output_tokens=len(flight.delivered) + max(1, min(num_left, self._expected_output_tokens)),
            block_size=model.block_size,
            avoid=avoid.row if avoid is not None else -1,
            ttft_s=max(1e-3, wishes.ttft_s - (now - flight.arrived_s)) if wishes.ttft_s and now is not None else 0.0,
            tpot_s=wishes.tpot_s,
            session=wishes.session,
        )

    def _charge(self, flight: InFlightRequest, decode: WorkerEntry, prefill: WorkerEntry, now: float) -> None:
        """Counts the request on its workers, and keeps its cached blocks longest in the index."""
        demand, cached = self._demand(flight), self._prefixes(flight).cached
        num_cached = int(cached[prefill.row])
        num_tokens = max(1, demand.num_prompt_tokens - num_cached * demand.block_size)
        self.uncached_share += 0.05 * (num_tokens / demand.num_prompt_tokens - self.uncached_share)
        if prefill is decode:
            decode.charge(flight.wire_id, Charge(now, 1, demand.num_blocks, num_tokens))
        else:
            decode.charge(flight.wire_id, Charge(now, 1, demand.num_blocks))
            prefill.charge(flight.wire_id, Charge(now, prefill_tokens=num_tokens))
        self._index.touch(flight.hashes[: max(num_cached, int(cached[decode.row]))])
