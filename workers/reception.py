"""Takes requests from routers, says whose each one is, and takes outputs the way back; knows no stream, no handoff and no batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from workers.client import Migration, Submit
from workers.engine_thread import Add, AddMigrant, CancelSequence, Command
from workers.errors import InvalidRequest, Refusal, Refused
from workers.identity import Identity
from workers.request import Output, Request, error_output, refusal_output
from workers.request_trace import RequestTraces
from workers.router_session import RouterSession
from workers.scheduler.sequence import Kind
from workers.status import WorkerAddress


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose sequence it is, what was asked for, and who is to compute its prompt or runs it so far."""

    session: RouterSession
    request: Request
    candidates: tuple[WorkerAddress, ...]
    migration: Migration | None


class Reception:
    """The requests of one worker by the engine's sequence ids. `post` hands a command to the engine thread."""

    def __init__(self, identity: Identity, post: Callable[[Command], None], clock: Callable[[], float]) -> None:
        self._identity = identity
        self._post = post
        self._clock = clock
        self._ids = itertools.count(1)
        self._owners: dict[int, Owner] = {}
        self._traces = RequestTraces()
        self._is_closed = False

    def new_sequence_id(self) -> int:
        return next(self._ids)

    @property
    def is_empty(self) -> bool:
        return not self._owners

    def owner(self, sequence_id: int) -> Owner | None:
        """None: it was cancelled, or is no request of a router."""
        return self._owners.get(sequence_id)

    def deadline_s(self, sequence_id: int) -> float:
        """When its first token is due, by the clock; infinity when nobody said."""
        return self._traces.deadline_s(sequence_id)

    def find(self, request_id: str) -> int | None:
        """The sequence of that name on the wire, whichever router it belongs to; None if it is not exactly one."""
        found = [number for number, owner in self._owners.items() if owner.request.request_id == request_id]
        return found[0] if len(found) == 1 else None

    def submit(self, session: RouterSession, submit: Submit) -> None:
        """Queues a request; one that is not accepted is answered at once."""
        request = submit.request
        try:
            self._check(session, submit)
        except (InvalidRequest, Refused) as error:
            session.add_output(refusal_output(request, error))
            return
        sequence_id = self.new_sequence_id()
        candidates = tuple(c for c in submit.prefill_workers if c.worker_id != self._identity.worker_id)
        self._owners[sequence_id] = Owner(session, request, candidates, submit.migration)
        self._traces.submitted(sequence_id, submit, self._clock())
        session.sequences[request.request_id] = sequence_id
        if submit.migration is not None:
            self._post(AddMigrant(sequence_id, request))
        else:
            self._post(Add(sequence_id, request, Kind.TARGET if candidates else Kind.LOCAL, submit.prefix))

    def _check(self, session: RouterSession, submit: Submit) -> None:
        me = self._identity
        if self._is_closed:
            raise Refused(Refusal.SHUTTING_DOWN, f"{me.worker_id} is stopping")
        if me.is_draining:
            raise Refused(Refusal.DRAINING, f"{me.worker_id} drains")
        if me.is_rebuilding:
            raise Refused(Refusal.SHUTTING_DOWN, f"{me.worker_id} waits for a rank")
        if not me.role.can_decode:
            raise Refused(Refusal.WRONG_ROLE, f"{me.worker_id} is a {me.role} worker")
        if submit.generation != me.generation:
            raise Refused(
                Refusal.STALE_GENERATION, f"{me.worker_id} is in generation {me.generation}, not {submit.generation}"
            )
        if submit.request.request_id in session.sequences:
            raise InvalidRequest(f"request {submit.request.request_id} is running already")

    def cancel(self, session: RouterSession, request_id: str) -> None:
        """Unknown names are ignored."""
        sequence_id = session.sequences.pop(request_id, None)
        if sequence_id is not None:
            self._forget(sequence_id)

    def leave(self, session: RouterSession) -> None:
        """The router is gone: nobody waits for its requests any more."""
        for sequence_id in session.sequences.values():
            self._forget(sequence_id)

    def _forget(self, sequence_id: int) -> None:
        self._owners.pop(sequence_id, None)
        self._traces.ended(sequence_id, "cancelled")
        self._post(CancelSequence(sequence_id))

    def deliver(self, sequence_id: int, output: Output) -> bool:
        """False: nobody here waits for it."""
        owner = self._owners.get(sequence_id)
        if owner is None:
            return False
        self._traces.said(sequence_id, output, self._clock())
        owner.session.add_output(output)
        if output.finish_reason is not None:
            del self._owners[sequence_id]
            owner.session.sequences.pop(output.request_id, None)
        return True

    def give_up_all(self, refusal: Refusal, message: str) -> None:
        """Ends every request, so that routers run it elsewhere."""
        for sequence_id, owner in list(self._owners.items()):
            self.deliver(sequence_id, error_output(owner.request, refusal, message))
            self._post(CancelSequence(sequence_id))

    def close(self) -> None:
        """Ends every request and takes no more."""
        self._is_closed = True
        self.give_up_all(Refusal.SHUTTING_DOWN, f"{self._identity.worker_id} is stopping")
