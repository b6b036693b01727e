"""One request on its way through the router: what the client has, and whether an output may follow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from router.requests.retry import RetryHistory
from router.wishes import NO_WISHES, Wishes
from workers.request import FinishReason, Output, Request


class Mismatch(Enum):
    """Why an output cannot follow the tokens that were delivered.

    REPEAT: it brings nothing new. GAP: tokens before it are missing. UNCUTTABLE: it begins with delivered tokens, and
    its text cannot be divided. CONFLICT: it says other tokens than those that the client has.
    """

    REPEAT = "repeat"
    GAP = "gap"
    UNCUTTABLE = "uncuttable"
    CONFLICT = "conflict"


@dataclass(slots=True)
class Incoming:
    """A second attempt, which takes a running one over. `buffered` are its outputs that the client is not ready for."""

    wire_id: str
    worker_id: str
    begun_s: float
    buffered: list[Output] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(slots=True)
class Flight:
    """A request that was accepted and has not ended. `delivered` are the output tokens the client has."""

    request: Request
    order: int
    arrived_s: float
    queued_s: float
    wishes: Wishes = NO_WISHES
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
    submitted_s: float = 0.0
    """When the running attempt was sent."""
    foretold_ttft_s: float = 0.0
    """Until its first token, as was expected then; 0: nobody asked."""
    left: tuple[str, str] | None = None
    """A worker that is there again, and the attempt which may run there still: unless the request is sent there, it is ended."""
    avoid_worker_id: str = ""
    incoming: Incoming | None = None
    moves_at_s: float = 0.0
    """A migration has failed: not again before this."""
    history: RetryHistory = field(default_factory=RetryHistory)

    def begin_attempt(self, worker_id: str, prefill_worker_id: str) -> None:
        """Names the next attempt on the wire and remembers where it runs, and who is to compute the prompt."""
        self.num_attempts += 1
        self.wire_id = f"{self.request.request_id}#{self.num_attempts}"
        self.worker_id = worker_id
        self.prefill_worker_id = prefill_worker_id
        self.has_spoken = False

    def begin_migration(self, worker_id: str, now: float) -> Incoming:
        """Names a second attempt, which takes the running one over."""
        self.num_attempts += 1
        self.incoming = Incoming(f"{self.request.request_id}#{self.num_attempts}", worker_id, now)
        return self.incoming

    def go_on(self, incoming: Incoming) -> None:
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
            priority=request.priority,
            traceparent=request.traceparent,
        )

    def accept(self, output: Output) -> Output | Mismatch:
        """Takes an output that follows what the client has, trimmed and named for the client; or says why not."""
        position = len(self.delivered)
        skip = position - output.position
        token_ids = output.token_ids
        if skip:
            mismatch = _compare(self.delivered, output, skip)
            if mismatch is not None:
                return mismatch
            token_ids = token_ids[skip:]
        self.delivered.extend(token_ids)
        is_first = not self.is_started and bool(token_ids or output.finish_reason)
        self.is_started |= is_first
        self.has_scores |= bool(output.prompt_logprobs)
        accepted = Output._make((self.request.request_id, *output[1:]))
        if skip:
            accepted = accepted._replace(position=position, token_ids=token_ids, logprobs=output.logprobs[skip:])
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
