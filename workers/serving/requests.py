"""What becomes of requests between routers and the engine: taken or refused, cancelled, delivered, left behind by a router, taken up by another.

Knows no batch, no handoff and no stream; the books are RequestTable's.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from math import inf

from workers.config import WorkerConfig
from workers.engine.messages import AddMigrant, AddSequence, CancelSequence
from workers.errors import InvalidRequest, Refusal, Refused
from workers.handoff.protocol.messages import RunningSubject
from workers.request import FinishReason, Output, end_output, error_output, refusal_output
from workers.scheduler.sequence import Kind
from workers.serving.events import Post
from workers.serving.kept_answers import KeptAnswers
from workers.serving.observer import Observer
from workers.serving.request_table import RequestTable
from workers.serving.served_request import ServedRequest, State
from workers.serving.sessions import Sessions
from workers.serving.standing import Standing
from workers.serving.waiting_jobs import WaitingJobs
from workers.trust.permits import is_permit
from workers.wire.attach import Adopt, Cancel, Find, Found, Submit

log = logging.getLogger(__name__)

TOO_LATE = "the request was not done in time"
QUEUE_IS_FULL = "the worker is so far behind that it takes no new request"


class Requests:
    """`new_number` gives a number that no sequence has. What routers are to hear is said to `sessions`."""

    def __init__(
        self,
        config: WorkerConfig,
        standing: Standing,
        sessions: Sessions,
        new_number: Callable[[], int],
        counters: Counter[str],
        observer: Observer,
    ) -> None:
        answers = KeptAnswers(config.answers_kept_s, config.max_kept_answer_bytes)
        self._table = RequestTable(config.max_kept_tokens, config.max_orphans, config.orphan_grace_s, answers)
        self._standing = standing
        self._sessions = sessions
        self._new_number = new_number
        self._counters = counters
        self._observer = observer
        self.waiting = WaitingJobs()

    def __len__(self) -> int:
        """Those that run."""
        return len(self._table)

    def get(self, sequence_id: int) -> ServedRequest | None:
        """One that runs. None: it was cancelled, or is no request of a router."""
        return self._table.get(sequence_id)

    def find(self, running: RunningSubject, target_id: str) -> int | None:
        """The engine's id of what runs under this name, whichever router it belongs to; None if it is not exactly one, or if its
        router has not made the permit for the worker `target_id`."""
        served = self._table.running_as(running.request_id)
        if served is None:
            return None
        if not is_permit(running.permit, served.key, target_id):
            self._counters["moves_not_permitted"] += 1
            return None
        served.moves_to = target_id
        return served.sequence_id

    def landed(self, sequence_id: int, token_ids: Sequence[int]) -> None:
        """A request has moved here: its output tokens so far."""
        served = self._table.get(sequence_id)
        if served is not None:
            served.landed(token_ids)

    def tell_time(self, now: float) -> None:
        """What ends from here on ends now."""
        self._table.answers.now = now

    @property
    def answer_bytes(self) -> int:
        """That kept answers take, about."""
        return self._table.answers.num_bytes

    # ---- routers ----

    def submit(self, session: int, submit: Submit, now: float) -> list[Post]:
        """Queues a request; one that is not accepted is answered at once."""
        request = submit.request
        attempt, name = request.request_id, submit.name or request.request_id
        try:
            self._standing.check_request(submit)
            if self._table.hears(session, attempt):
                raise InvalidRequest(f"request {attempt} is running already")
        except (InvalidRequest, Refused) as error:
            self._sessions.say(session, refusal_output(request, error))
            return []
        earlier, commands = self._table.orphan_named(name), []
        if earlier is not None:  # its router runs it again here: it goes on instead, where that is the same
            continued = Adopt(name, attempt, len(request.replay_token_ids), submit.key)
            if _continues(submit, earlier) and self._take_up(session, continued):
                return []
            commands = self._give_up(earlier)
        sequence_id, me = self._new_number(), self._standing.identity.worker_id
        candidates = tuple(c for c in submit.prefill_workers if c.worker_id != me)
        served = ServedRequest(
            sequence_id=sequence_id,
            name=name,
            attempt=attempt,
            request=request,
            candidates=candidates,
            migration=submit.migration,
            due_s=min(
                (now + left_s for left_s in (submit.remaining_s, submit.first_token_s) if left_s > 0), default=inf
            ),
            ends_s=now + submit.remaining_s if submit.remaining_s > 0 else inf,
            owner=session,
            key=submit.key,
            end=len(request.replay_token_ids),
            job=submit.kept,
            cached_tokens=submit.cached_tokens,
            token_ids=array("I", request.replay_token_ids),
        )
        self._table.add(served)
        log.debug("takes a request of %d prompt tokens", len(request.prompt_token_ids), extra=request.log_fields)
        self._observer.submitted(sequence_id, request.traceparent, now)
        if submit.migration is not None:
            return [*commands, Post(AddMigrant(sequence_id, request))]
        kind = Kind.TARGET if candidates else Kind.LOCAL
        return [*commands, Post(AddSequence(sequence_id, request, kind, submit.prefix))]

    def cancel(self, session: int, cancel: Cancel, now: float) -> list[Post]:
        """By its owner, or by anybody when it has none; while others hear of it, it is theirs. Unknown names are ignored."""
        attempt, table = cancel.request_id, self._table
        owned = table.of(session, attempt)
        if owned is not None:
            if table.pass_on(owned, self._sessions.num_said):
                return []
            if cancel.lets_go:
                self._counters["requests_let_go"] += 1
                return self._give_up_orphans(table.let_go(owned, now))
            return self._give_up(owned)
        heard = table.listener_of(session, attempt)
        if heard is not None:
            table.leave(heard, session, attempt)
            return []
        orphan = table.orphan_as(attempt)
        return [] if orphan is None or cancel.lets_go else self._give_up(orphan)

    def look_up(self, session: int, find: Find) -> list[Post]:
        """What is here of a job, or waits at a router; with `ends` it is here no more afterwards, and who hears of it is told."""
        served = self._table.of_job(find.job)
        jobs = [each.job for each in served if each.job is not None]
        ticket = next((job.ticket for job in jobs if job.ticket), b"")
        num_requests = max((job.num_requests for job in jobs), default=0)
        waits = self.waiting.get(find.job)
        if waits is not None:
            ticket, num_requests = ticket or waits.ticket, num_requests or waits.num_requests
        found = Found(find.number, tuple(each.found() for each in served), num_requests, ticket, waits is not None)
        self._sessions.tell_found(session, found)
        if find.ends and find.relays:
            self._sessions.tell_ended(session, find.job)
        commands: list[Post] = []
        for each in served if find.ends else ():
            owner = [] if each.owner is None or each.state is not State.RUNNING else [(each.owner, each.attempt)]
            for hearer, attempt in [*owner, *each.listeners]:
                self._sessions.say(
                    hearer, end_output(attempt, Refusal.CANCELLED, "it was cancelled by who had asked for it")
                )
            commands += self._give_up(each)
        return commands

    def adopt(self, session: int, adopt: Adopt) -> None:
        """A router takes a request up where its client is, whoever had it before."""
        attempt, former = adopt.request_id, self._table.owner_of(adopt.name)
        if self._table.hears(session, attempt):
            self._sessions.say(session, end_output(attempt, Refusal.INVALID, f"request {attempt} is running already"))
        elif adopt.joins and former is not None:
            self._join(session, adopt)
        elif not self._take_up(session, adopt):
            self._counters["adoptions_refused"] += 1
            text = f"output {adopt.position} of request {adopt.name} is not kept here"
            self._sessions.say(session, end_output(attempt, Refusal.NOT_KEPT, text))
        elif former is not None:
            self._sessions.say(former[0], end_output(former[1], Refusal.TAKEN_UP, "another router has taken it up"))

    def _join(self, session: int, adopt: Adopt) -> None:
        served = self._table.named(adopt.name)
        outputs = None if served is None else self._table.join(served, session, adopt)
        self._counters["joins_refused" if outputs is None else "requests_joined"] += 1
        if outputs is None:
            text = f"output {adopt.position} of request {adopt.name} is not kept here"
            outputs = [end_output(adopt.request_id, Refusal.NOT_KEPT, text)]
        for output in outputs:
            self._sessions.say(session, output)

    def _take_up(self, session: int, adopt: Adopt) -> bool:
        """False: it is not here, or not from there."""
        outputs = self._table.adopt(adopt, session, self._sessions.num_said(session))
        if outputs is None:
            return False
        self._counters["requests_adopted"] += 1
        for output in outputs:
            self._sessions.say(session, output)
        return True

    def written(self, session: int) -> None:
        """All frames that a session was given have been written."""
        self._table.written(session, self._sessions.num_framed(session))

    def lose_router(self, session: int, now: float) -> list[Post]:
        """What it asked for runs on for a while, for whoever takes it up."""
        self.waiting.lose(session)
        before = self._table.num_orphans
        too_many = self._table.orphan(session, now, self._sessions.num_said)
        self._counters["requests_orphaned"] += self._table.num_orphans - before
        return self._give_up_orphans(too_many)

    # ---- the engine ----

    def deliver(self, served: ServedRequest, output: Output, now: float) -> list[Post]:
        """An output, to whoever owns the request; without an owner it is kept."""
        self._observer.said(served.sequence_id, output, now)
        if output.request_id != served.attempt:  # it has been taken up since
            output = output._replace(request_id=served.attempt)
        can_be_taken_up = self._table.keep(served, output)
        if served.owner is not None:
            self._sessions.say(served.owner, output)
        has_moved = output.finish_reason is FinishReason.MOVED
        for session, attempt in served.listeners:  # the owner's router has had it moved, and knows where it is
            message = served.moves_to if has_moved else output.message
            self._sessions.say(session, output._replace(request_id=attempt, message=message))
        if output.finish_reason is not None:
            num_tokens, about = output.position + len(output.token_ids), served.request.log_fields
            log.debug("a request ends after %d tokens: %s", num_tokens, output.finish_reason, extra=about)
            self._table.end(served, output, self._sessions.num_said(served.owner))
        elif not can_be_taken_up:
            return self._give_up_orphans([served])
        return []

    def not_added(self, sequence_id: int, now: float) -> list[Post]:
        """The engine did not take a request; whoever owns it may try again."""
        served = self._table.get(sequence_id)
        if served is None:
            return []
        return self.deliver(served, error_output(served.request, Refusal.QUEUE_FULL, QUEUE_IS_FULL), now)

    def end_all(self, refusal: Refusal, message: str, now: float) -> list[Post]:
        """Ends every request that runs, so that routers run it elsewhere."""
        commands: list[Post] = []
        for served in self._table:
            if served.owner is None:
                commands += self._give_up(served)
            else:
                self.deliver(served, error_output(served.request, refusal, message), now)
                commands.append(Post(CancelSequence(served.sequence_id)))
        return commands

    # ---- time ----

    @property
    def next_due_s(self) -> float:
        """When a request is to end, an orphan's grace ends, or an answer has been kept long enough."""
        return self._table.next_due_s

    def check_time(self, now: float) -> list[Post]:
        """Ends what was to be done by now, and gives up what nobody has taken up in time; what has ended is kept with the other answers."""
        self._table.drop_old_answers(now)
        commands = [command for served in self._table.past(now) for command in self._end_late(served, now)]
        return commands + self._give_up_orphans(self._table.expired(now))

    def _end_late(self, served: ServedRequest, now: float) -> list[Post]:
        """Nobody waits any longer, whether or not its router has said so."""
        self._counters["requests_too_late"] += 1
        if served.owner is None:
            return self._give_up(served)
        self.deliver(served, error_output(served.request, Refusal.DEADLINE_EXCEEDED, TOO_LATE), now)
        return [Post(CancelSequence(served.sequence_id))]

    def _give_up_orphans(self, orphans: list[ServedRequest]) -> list[Post]:
        given_up = [served for served in orphans if not self._table.wait_out(served)]
        self._counters["orphans_given_up"] += len(given_up)
        return [command for served in given_up for command in self._give_up(served)]

    def _give_up(self, served: ServedRequest) -> list[Post]:
        """Nobody wants it any more."""
        if not self._table.drop(served):
            return []
        self._observer.cancelled(served.sequence_id)
        return [Post(CancelSequence(served.sequence_id))]


def _continues(submit: Submit, earlier: ServedRequest) -> bool:
    """Whether an attempt is of the request that an earlier one was, and of nothing but the name."""
    ours, theirs = submit.request, earlier.request
    same = (ours.prompt_token_ids, ours.params, ours.choice_index) == (
        theirs.prompt_token_ids, theirs.params, theirs.choice_index,
    )  # fmt: skip
    return same and submit.migration is None
