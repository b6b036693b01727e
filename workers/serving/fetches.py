"""Has other workers fill the engine's blocks: prompts they compute, sequences they run, prefixes they cache. Decides whom to ask and how a failure goes on.

Everything the engine wants is answered exactly once, when nothing writes into its blocks any more. Knows no stream and no transport.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace

from workers.engine.messages import Landed, MovedIn, Pulled, PullWanted, TransferLost, TransferWanted
from workers.errors import Refusal
from workers.handoff.protocol.choices import Measured, Plan, PullRates, Recovery, RecoveryChoice, is_worth_pulling
from workers.handoff.protocol.messages import (
    Handoff,
    HandoffFailed,
    PrefillDone,
    PrefixDone,
    PromptSubject,
    RunningSubject,
    SequenceMoved,
    subject_of,
)
from workers.kv_memory.memory import KvLayout
from workers.request import HandoffReport, Request
from workers.runner import BLOCK_SIZE, Sampled
from workers.serving.events import Post, Receive, StopReceiving
from workers.serving.observer import Observer
from workers.status import WorkerAddress
from workers.wire.attach import Migration

log = logging.getLogger(__name__)

MIN_PATIENCE_S = 1.0

Commands = list[Post | Receive | StopReceiving]


@dataclass(slots=True)
class _Fetch:
    """A prompt that is computed elsewhere. `report` says what came of it so far."""

    wanted: TransferWanted
    request: Request
    candidates: tuple[WorkerAddress, ...]
    plan: Plan
    report: HandoffReport
    is_abandoned: bool = False

    @property
    def source(self) -> WorkerAddress:
        """Who is being asked."""
        return self.candidates[self.report.attempts - 1]


@dataclass(frozen=True, slots=True)
class _TakeOver:
    wanted: TransferWanted
    migration: Migration


@dataclass(frozen=True, slots=True)
class _Pull:
    wanted: PullWanted
    begun_s: float


class Fetches:
    """`worker_id` and `layout` are this worker's; `timeout_s` bounds a transfer without progress."""

    def __init__(
        self,
        worker_id: str,
        layout: KvLayout,
        timeout_s: float,
        counters: Counter[str],
        observer: Observer,
    ) -> None:
        self._worker_id = worker_id
        self._layout = layout
        self._timeout_s = timeout_s
        self._counters = counters
        self._observer = observer
        self._rates = PullRates()
        self._running: dict[int, _Fetch | _TakeOver | _Pull] = {}
        self.measured = Measured()

    def __len__(self) -> int:
        return len(self._running)

    # ---- what the engine wants ----

    def fetch(
        self, wanted: TransferWanted, request: Request, candidates: tuple[WorkerAddress, ...], due_s: float, now: float
    ) -> Commands:
        """The prompt is to be computed by one of the candidates. `due_s` is when the first token is due: it decides how to go
        on after a fault."""
        num_tokens = len(request.prompt_token_ids) - wanted.first_block * BLOCK_SIZE
        plan = Plan(self.measured, due_s, num_tokens, tuple(c.worker_id for c in candidates))
        report = HandoffReport(self._worker_id, self._worker_id, "local", attempts=0)
        fetch = self._running[wanted.sequence_id] = _Fetch(wanted, request, candidates, plan, report)
        return self._ask_next(fetch, now)

    def take_over(self, wanted: TransferWanted, migration: Migration) -> Commands:
        """A running sequence's blocks and state are to be sent here."""
        self._running[wanted.sequence_id] = _TakeOver(wanted, migration)
        subject = RunningSubject(migration.request_id, migration.permit)
        return [Receive(wanted.sequence_id, migration.source, subject, wanted.first_block, wanted.blocks)]

    def pull(self, wanted: PullWanted, now: float) -> Commands:
        """A peer is to send prefix blocks, where that beats computing them. It is waited for no longer than that would take,
        or a second."""
        num_blocks, speed = len(wanted.keys), wanted.prefill_tokens_per_s
        num_tokens, num_bytes = num_blocks * self._layout.block_size, num_blocks * self._layout.block_bytes
        if not is_worth_pulling(num_tokens, num_bytes, speed, self._rates.rate(wanted.peer.worker_id, now)):
            self._counters["prefix_pulls_not_worth_it"] += 1
            return [Post(Pulled(wanted.sequence_id, 0))]
        self._counters["prefix_pulls"] += 1
        self._running[wanted.sequence_id] = _Pull(wanted, now)
        patience_s = min(self._timeout_s, max(MIN_PATIENCE_S, num_tokens / speed)) if speed > 0 else self._timeout_s
        subject = subject_of(wanted.keys)
        number = wanted.sequence_id
        return [Receive(number, wanted.peer, subject, wanted.first_block, wanted.blocks, patience_s=patience_s)]

    def decline(self, sequence_id: int) -> Commands:
        """Nobody waits for this sequence any more, or no transfer came about."""
        me = self._worker_id
        return [Post(TransferLost(sequence_id, HandoffReport(me, me, "local")))]

    def abandon(self, sequence_id: int) -> Commands:
        """The request was cancelled: its transfer stops, then the engine hears so and frees the blocks."""
        running = self._running.get(sequence_id)
        if running is None:
            return []
        if isinstance(running, _Fetch):
            running.is_abandoned = True
        return [StopReceiving(sequence_id)]

    def abandon_all(self) -> Commands:
        return [command for sequence_id in list(self._running) for command in self.abandon(sequence_id)]

    # ---- what came of it ----

    def ended(self, sequence_id: int, outcome: Handoff | HandoffFailed | None, now: float) -> Commands:
        """A Receive is over; None: it was stopped, or broke in a way nobody expected."""
        running = self._running.get(sequence_id)
        match running:
            case _Fetch():
                return self._fetch_ended(running, outcome, now)
            case _TakeOver():
                del self._running[sequence_id]
                return self._take_over_ended(running, outcome)
            case _Pull():
                del self._running[sequence_id]
                return [Post(Pulled(sequence_id, self._num_pulled(running, outcome, now)))]
            case None:
                return []

    def _ask_next(self, fetch: _Fetch, now: float) -> Commands:
        """Asks the next candidate; without one, this worker computes the prompt itself."""
        wanted, attempt = fetch.wanted, fetch.report.attempts + 1
        fetch.report = replace(fetch.report, attempts=attempt)
        if attempt > len(fetch.candidates):
            return self._compute_here(fetch)
        fetch.plan.ask(fetch.source.worker_id, now)
        traceparent = self._observer.handoff_begun(
            wanted.sequence_id, fetch.request.traceparent, fetch.source.worker_id, attempt
        )
        subject = PromptSubject(replace(fetch.request, traceparent=traceparent), wanted.hint)
        return [Receive(wanted.sequence_id, fetch.source, subject, wanted.first_block, wanted.blocks, fetch.plan)]

    def _compute_here(self, fetch: _Fetch) -> Commands:
        del self._running[fetch.wanted.sequence_id]
        self._counters["local_prefills_after_failure"] += 1
        return [Post(TransferLost(fetch.wanted.sequence_id, fetch.report))]

    def _fetch_ended(self, fetch: _Fetch, outcome: Handoff | HandoffFailed | None, now: float) -> Commands:
        sequence_id = fetch.wanted.sequence_id
        outcome = _of_kind(outcome, PrefillDone)
        if isinstance(outcome, HandoffFailed) and not fetch.is_abandoned:
            choice = fetch.plan.after_fault(now)
            self._observer.handoff_ended(sequence_id, outcome, choice)
            self._lost(fetch, outcome, choice)
            if choice.recovery is not Recovery.LOCAL:
                return self._ask_next(fetch, now)
            fetch.report = replace(fetch.report, attempts=fetch.report.attempts + 1)
            return self._compute_here(fetch)
        self._observer.handoff_ended(sequence_id, outcome, None)
        del self._running[sequence_id]
        if not isinstance(outcome, Handoff):
            return self.decline(sequence_id)
        return self._landed(fetch, outcome)

    def _lost(self, fetch: _Fetch, error: HandoffFailed, choice: RecoveryChoice) -> None:
        me, source = self._worker_id, fetch.source.worker_id
        about = fetch.request.log_fields
        log.warning("%s could not fetch a prompt from %s: %s: %s", me, source, error, choice.recovery, extra=about)
        self._counters["handoffs_failed"] += 1
        self._counters[f"recovery_{choice.recovery}"] += 1
        self._counters[f"recovery_{Recovery.NEXT_TRANSPORT}"] += error.degradations
        report = fetch.report
        fetch.report = replace(
            report,
            resends=report.resends + error.resends,
            degradations=report.degradations + error.degradations,
            recovery=choice.recovery.value,
        )

    def _landed(self, fetch: _Fetch, handoff: Handoff) -> Commands:
        done, so_far, source = handoff.done, fetch.report, fetch.source.worker_id
        assert isinstance(done, PrefillDone)
        self._counters["handoffs_landed"] += 1
        self._counters[f"handoffs_landed_{handoff.transport}"] += 1
        self._counters["handoff_received_bytes"] += handoff.kv_bytes
        self._counters[f"recovery_{Recovery.NEXT_TRANSPORT}"] += handoff.degradations
        num_computed = len(fetch.request.prompt_token_ids) - done.cached_tokens
        self.measured.landed(source, handoff.kv_bytes, handoff.transfer_s, num_computed, done.prefill_s)
        report = replace(
            so_far,
            prefill_worker=source,
            transport=handoff.transport,
            kv_bytes=handoff.kv_bytes,
            transfer_s=handoff.transfer_s,
            prefill_s=done.prefill_s,
            wait_s=handoff.wait_s,
            exposed_s=handoff.exposed_s,
            resends=so_far.resends + handoff.resends,
            degradations=so_far.degradations + handoff.degradations,
            recovery=Recovery.NEXT_TRANSPORT.value if handoff.degradations else so_far.recovery,
        )
        sequence_id = fetch.wanted.sequence_id
        sampled = Sampled(sequence_id, done.token_id, done.logprob)
        return [Post(Landed(sequence_id, sampled, done.cached_tokens, report))]

    def _take_over_ended(self, taken: _TakeOver, outcome: Handoff | HandoffFailed | None) -> Commands:
        sequence_id, name, source = taken.wanted.sequence_id, taken.migration.request_id, taken.migration.source
        outcome = _of_kind(outcome, SequenceMoved)
        if isinstance(outcome, HandoffFailed):
            self._counters["migrations_in_failed"] += 1
            me, about = self._worker_id, {"request_id": name}
            log.warning("%s could not take over %s from %s: %s", me, name, source.worker_id, outcome, extra=about)
        if not isinstance(outcome, Handoff):
            return self.decline(sequence_id)
        done = outcome.done
        assert isinstance(done, SequenceMoved)
        self._counters["migrations_in"] += 1
        self._counters["migrated_bytes"] += outcome.kv_bytes
        return [Post(MovedIn(sequence_id, done.known_token_ids, done.num_computed))]

    def _num_pulled(self, pull: _Pull, outcome: Handoff | HandoffFailed | None, now: float) -> int:
        """How many blocks landed; what that took is remembered of the peer."""
        peer, elapsed_s = pull.wanted.peer.worker_id, now - pull.begun_s
        if outcome is None:
            return 0
        if isinstance(outcome, HandoffFailed):
            self._counters["prefix_pulls_failed"] += 1
            log.warning("%s did not send a prefix: %s", peer, outcome)
            self._rates.note(peer, 0, elapsed_s, now)
            return 0
        num_blocks = num_bytes = 0
        if isinstance(outcome.done, PrefixDone):
            num_blocks = min(outcome.done.num_blocks, outcome.kv_bytes // self._layout.block_bytes)
            num_bytes = outcome.kv_bytes
        if num_blocks:
            self._rates.note(peer, num_bytes, elapsed_s, now)
        else:
            self._counters["prefix_pulls_empty"] += 1
        self._counters["prefix_pulled_blocks"] += num_blocks
        self._counters["prefix_pulled_bytes"] += num_bytes
        return num_blocks


def _of_kind(outcome: Handoff | HandoffFailed | None, kind: type) -> Handoff | HandoffFailed | None:
    """A sender that ends one thing as if it were another has sent nothing."""
    if isinstance(outcome, Handoff) and not isinstance(outcome.done, kind):
        return HandoffFailed(f"the sender ended with {type(outcome.done).__name__}", Refusal.INTERNAL)
    return outcome
