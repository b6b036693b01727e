"""One request between its arrival and its end: its attempts, the tokens that its client has, and when it may be tried again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from router.job_part import NO_JOB, JobPart
from router.requests.journal import Step, Way, note
from router.wishes import NO_WISHES, Wishes
from workers.errors import Refusal
from workers.request import FinishReason, Output, Request, make_tuple


class Treatment(Enum):
    """FINAL: the client gets it. FAULT: run again, a few times without progress. BUSY: run again, for a while. ONCE: run again once."""

    FINAL = "final"
    FAULT = "fault"
    BUSY = "busy"
    ONCE = "once"


TREATMENTS: dict[Refusal, Treatment] = {
    Refusal.INVALID: Treatment.FINAL,
    Refusal.RATE_LIMITED: Treatment.FINAL,
    Refusal.DEADLINE_EXCEEDED: Treatment.FINAL,
    Refusal.TARGET_MISSED: Treatment.FINAL,
    Refusal.WORKER_LOST: Treatment.FAULT,
    Refusal.WORKERS_DIED: Treatment.FINAL,
    Refusal.NO_WORKERS: Treatment.FAULT,
    Refusal.QUEUE_FULL: Treatment.BUSY,
    Refusal.WRONG_ROLE: Treatment.BUSY,
    Refusal.STALE_GENERATION: Treatment.BUSY,
    Refusal.DRAINING: Treatment.BUSY,
    Refusal.NOT_MOVABLE: Treatment.BUSY,
    Refusal.NOT_KEPT: Treatment.BUSY,
    Refusal.TAKEN_UP: Treatment.FINAL,
    Refusal.CANCELLED: Treatment.FINAL,
    Refusal.SHUTTING_DOWN: Treatment.BUSY,
    Refusal.INTERNAL: Treatment.ONCE,
}


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounds of re-runs; times in seconds.

    `max_attempts` counts attempts in a row that brought no token: a request that makes progress may be re-run for ever,
    one that does not may not. One under which `max_lost_workers` in a row were lost may be what kills them. A busy cluster is asked again until it has refused for `patience_s` without a break.
    The first re-run is immediate, later ones wait `backoff_s`, doubled each time, at most `max_backoff_s`.
    """

    max_attempts: int = 5
    max_lost_workers: int = 2
    backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    patience_s: float = 60.0


@dataclass(slots=True)
class RetryHistory:
    """What went wrong with one request since it last made progress (INTERNAL: since it began)."""

    num_setbacks: int = 0
    num_faults: int = 0
    num_lost_workers: int = 0
    """That have not come back with what they ran."""
    num_internal: int = 0
    busy_since_s: float = 0.0
    """When the last run of refusals by busy workers began; the time that an attempt ran on a worker is not such."""
    last_refusal: Refusal | None = None

    def progress(self) -> None:
        self.num_setbacks = 0
        self.num_faults = 0
        self.num_lost_workers = 0
        self.last_refusal = None

    def worker_lost(self, policy: RetryPolicy) -> bool:
        """A worker is gone while it ran the request. Returns whether that was one too many."""
        self.num_lost_workers += 1
        return self.num_lost_workers >= policy.max_lost_workers

    def worker_is_back(self) -> None:
        """It was the connection that was lost, and not the worker."""
        self.num_lost_workers = max(0, self.num_lost_workers - 1)

    def setback(self, refusal: Refusal, policy: RetryPolicy, now: float) -> float | None:
        """Records a failed attempt. Returns the seconds to wait before the next one; None: give up."""
        if self.last_refusal is None or TREATMENTS[self.last_refusal] is not Treatment.BUSY:
            self.busy_since_s = now
        self.num_setbacks += 1
        self.last_refusal = refusal
        match TREATMENTS[refusal]:
            case Treatment.FINAL:
                return None
            case Treatment.FAULT:
                self.num_faults += 1
                if self.num_faults >= policy.max_attempts:
                    return None
            case Treatment.BUSY:
                if now - self.busy_since_s > policy.patience_s:
                    return None
            case Treatment.ONCE:
                self.num_internal += 1
                if self.num_internal > 1:
                    return None
        if self.num_setbacks == 1:
            return 0.0
        return float(min(policy.backoff_s * 2 ** min(self.num_setbacks - 2, 30), policy.max_backoff_s))


class Mismatch(Enum):
    """Why an output cannot follow the tokens that were delivered.

    REPEAT: it brings nothing new. GAP: tokens before it are missing. UNCUTTABLE: it begins with delivered tokens, and
    its text cannot be divided. CONFLICT: it says other tokens than those that the client has. IMPOSSIBLE: no worker that works says
    this: more tokens than were asked for, or not a logprob for each.
    """

    REPEAT = "repeat"
    GAP = "gap"
    UNCUTTABLE = "uncuttable"
    CONFLICT = "conflict"
    IMPOSSIBLE = "impossible"


@dataclass(slots=True)
class MigrationAttempt:
    """A second attempt, which takes a running one over. `buffered` are its outputs that the client is not ready for."""

    wire_id: str
    worker_id: str
    begun_s: float
    buffered: list[Output] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(slots=True)
class InFlightRequest:
    """A request that was accepted and has not ended. `delivered` are the output tokens the client has."""

    request: Request
    order: int
    arrived_s: float
    queued_s: float
    wishes: Wishes = NO_WISHES
    part: JobPart = NO_JOB
    cached_tokens: int = 0
    """Of the prompt, as its first output said."""
    hashes: list[int] = field(default_factory=list)
    """Names of the prompt's full blocks, of so many tokens each:"""
    block_size: int = 0
    delivered: list[int] = field(default_factory=list)
    is_started: bool = False
    """The client has its first token, or its end."""
    has_scores: bool = False
    """The client has scores of the prompt, which come before the first token."""
    num_attempts: int = 0
    wire_id: str = ""
    """The running attempt's name on the wire; empty while the request waits for a worker."""
    worker_id: str = ""
    """Where the running attempt decodes, or the last one did."""
    prefill_worker_id: str = ""
    """Who was expected to compute the prompt."""
    has_spoken: bool = False
    """The running attempt has brought an output, so its prompt has been computed."""
    spoke_s: float | None = None
    """When its first output came, of whichever attempt."""
    is_taken_up: bool = False
    """It was found at a worker when it came."""
    submitted_s: float = 0.0
    """When the running attempt was sent."""
    foretold_ttft_s: float = 0.0
    """Until its first token, as was expected then; 0: nobody asked."""
    left: tuple[str, str] | None = None
    """A worker that is there again, and the attempt which may run there still: unless the request is sent there, it is ended."""
    avoid_worker_id: str = ""
    incoming: MigrationAttempt | None = None
    moves_at_s: float = 0.0
    """A migration has failed: not again before this."""
    history: RetryHistory = field(default_factory=RetryHistory)
    steps: list[Step] = field(default_factory=list)
    """Where it has been, for operators."""

    @property
    def name(self) -> str:
        """By which every router and worker knows it."""
        return self.part.name or self.request.request_id

    def way(self, ended: str = "") -> Way:
        """What operators see of it; `ended`: how it has."""
        state = "decode" if self.has_spoken else "prefill"
        state = "moving" if self.incoming is not None else state if self.wire_id else "waiting"
        return Way(
            self.request.request_id,
            self.wishes.tenant,
            self.arrived_s,
            len(self.request.prompt_token_ids),
            self.cached_tokens,
            len(self.delivered),
            self.num_attempts,
            self.worker_id,
            self.prefill_worker_id,
            "ended" if ended else state,
            ended,
            tuple(self.steps),
        )

    def note(self, now: float, what: str, worker_id: str = "", why: str = "") -> None:
        """The next step of its way."""
        note(self.steps, Step(now, what, worker_id, why))

    def begin_attempt(self, worker_id: str, prefill_worker_id: str) -> None:
        """Names the next attempt on the wire and remembers where it runs, and who is to compute the prompt."""
        self.num_attempts += 1
        self.wire_id = f"{self.request.request_id}#{self.num_attempts}"
        self.worker_id = worker_id
        self.prefill_worker_id = prefill_worker_id
        self.has_spoken = False

    def begin_migration(self, worker_id: str, now: float) -> MigrationAttempt:
        """Names a second attempt, which takes the running one over."""
        self.num_attempts += 1
        self.incoming = MigrationAttempt(f"{self.request.request_id}#{self.num_attempts}", worker_id, now)
        return self.incoming

    def go_on(self, incoming: MigrationAttempt) -> None:
        """The second attempt is the running one from now on."""
        self.wire_id = incoming.wire_id
        self.worker_id = self.prefill_worker_id = incoming.worker_id

    def attempt_request(self, wire_id: str) -> Request:
        """The request for the wire: named after the attempt, with the delivered tokens to replay."""
        request = self.request
        return Request(
            request_id=wire_id,
            prompt_token_ids=request.prompt_token_ids,
            params=request.params,
            choice_index=request.choice_index,
            replay_token_ids=tuple(self.delivered),
            priority=0
            if self.wishes.tenant
            else request.priority,  # it counts among one tenant's requests, in the queue
            traceparent=request.traceparent,
            cache_salt=request.cache_salt,
        )

    def accept(self, output: Output) -> Output | Mismatch:
        """Takes an output that follows what the client has, trimmed and named for the client; or says why not."""
        position, request = len(self.delivered), self.request
        skip, token_ids, logprobs = position - output.position, output.token_ids, output.logprobs
        if skip:
            mismatch = _compare(self.delivered, output, skip)
            if mismatch is not None:
                return mismatch
            token_ids = token_ids[skip:]
        is_too_long = position + len(token_ids) > request.params.max_tokens
        if is_too_long or (logprobs and len(logprobs) != len(output.token_ids)):
            return Mismatch.IMPOSSIBLE
        self.delivered += token_ids
        is_first = not self.is_started and bool(token_ids or output.finish_reason)
        self.is_started |= is_first
        self.cached_tokens = self.cached_tokens or output.cached_tokens
        self.has_scores |= bool(output.prompt_logprobs)
        accepted = make_tuple(Output, (request.request_id, *output[1:]))
        if skip:
            accepted = accepted._replace(position=position, token_ids=token_ids, logprobs=logprobs[skip:])
        if not is_first and (output.cached_tokens or output.handoff):
            accepted = accepted._replace(cached_tokens=0, handoff=None)
        return accepted


def _compare(delivered: Sequence[int], output: Output, skip: int) -> Mismatch | None:
    """Judges an output whose first token is not the next one; None: its first `skip` tokens may be cut off."""
    if skip < 0:
        return Mismatch.GAP
    repeated = output.token_ids[:skip]
    if tuple(delivered[output.position : output.position + len(repeated)]) != repeated:
        return Mismatch.CONFLICT
    is_whole = skip >= len(output.token_ids)
    if output.finish_reason is FinishReason.ERROR:
        return Mismatch.REPEAT
    if output.finish_reason is None and is_whole:
        return Mismatch.REPEAT
    if output.finish_reason is not None and skip > len(output.token_ids):
        return Mismatch.CONFLICT
    return Mismatch.UNCUTTABLE if output.text else None
