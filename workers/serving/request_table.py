"""The requests of one worker, by owner and name, and what outlives its router. Knows no stream, no engine and no batch.

A request belongs to the worker. Its owner is the session that hears of it; a request whose session is lost has none, goes on for a
grace, and can be taken up by another session from the output that its client has. So can what has ended meanwhile, and for a while
what has ended long ago (workers/serving/kept_answers.py). Other sessions may hear of a request beside its owner; when the owner goes,
the first of them is the owner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from math import inf

from workers.deadlines import Deadlines
from workers.request import FinishReason, Output
from workers.serving.kept_answers import KeptAnswers
from workers.serving.served_request import SERVED_REQUEST, Effect, ServedRequest, State, Turn
from workers.shares import Shares
from workers.wire.attach import Adopt


class RequestTable:
    """At most `max_kept_tokens` entries are kept of each request (a token is one, each alternative among logprobs another), and at
    most `max_orphans` requests without a session, each for `orphan_grace_s`; those of the background do not count, and where there are
    more the oldest go of the tenant that has most. What has ended and can be asked for by its job goes to `answers`.

    An attempt's name belongs to its session: two routers may use the same one.
    """

    def __init__(
        self, max_kept_tokens: int, max_orphans: int, orphan_grace_s: float, answers: KeptAnswers | None = None
    ) -> None:
        self.answers = KeptAnswers() if answers is None else answers
        self._max_kept = max_kept_tokens
        self._grace_s = orphan_grace_s
        self._running: dict[int, ServedRequest] = {}
        self._by_name: dict[str, ServedRequest] = {}
        """The last attempt of each; also those that have ended and can be taken up."""
        self._owned: dict[int, dict[str, ServedRequest]] = {}
        """By session what runs."""
        self._unwritten: dict[int, deque[ServedRequest]] = {}
        """By session what has ended, as long as the frame that says so has not been written."""
        self._orphans: dict[int, ServedRequest] = {}
        """By sequence id, the oldest first."""
        self._orphan_shares: Shares[int, int] = Shares(max_orphans)
        self._deadlines: Deadlines[int] = Deadlines()
        """Of what runs for its first owner, or for nobody."""
        self._heard: dict[tuple[int, str], ServedRequest] = {}
        """What sessions that are not the owner hear of, each with what it calls it."""
        self._by_job: dict[str, dict[str, ServedRequest]] = {}
        """The last attempt of each request of a job, by name."""

    def __len__(self) -> int:
        """Those that run."""
        return len(self._running)

    def __iter__(self) -> Iterator[ServedRequest]:
        return iter(list(self._running.values()))

    @property
    def num_orphans(self) -> int:
        return len(self._orphans)

    def add(self, served: ServedRequest) -> None:
        assert served.owner is not None
        self._running[served.sequence_id] = served
        self._by_name[served.name] = served
        if served.job is not None:
            self._by_job.setdefault(served.job.job, {})[served.name] = served
        self._owned.setdefault(served.owner, {})[served.attempt] = served
        if served.ends_s < inf:
            self._deadlines.add(served.sequence_id, served.ends_s)

    def get(self, sequence_id: int) -> ServedRequest | None:
        """One that runs. None: it was cancelled, or is no request of a router."""
        return self._running.get(sequence_id)

    def of(self, owner: int, attempt: str) -> ServedRequest | None:
        """The request that runs for a session under this name."""
        return self._owned.get(owner, {}).get(attempt)

    def running_as(self, attempt: str) -> ServedRequest | None:
        """The request of that name, whichever router it belongs to; None if it is not exactly one."""
        found = [served for served in self._running.values() if served.attempt == attempt]
        return found[0] if len(found) == 1 else None

    def orphan_as(self, attempt: str) -> ServedRequest | None:
        """The orphan whose last owner called it so."""
        return next((served for served in self._orphans.values() if served.attempt == attempt), None)

    def orphan_named(self, name: str) -> ServedRequest | None:
        """An earlier attempt of the request that nobody has taken up."""
        served = self._by_name.get(name)
        return served if served is not None and served.owner is None else None

    def of_job(self, job: str) -> list[ServedRequest]:
        """What is here of a job, running or ended."""
        return list(self._by_job.get(job, {}).values())

    def listener_of(self, session: int, attempt: str) -> ServedRequest | None:
        """What a session that is not its owner hears of as `attempt`."""
        return self._heard.get((session, attempt))

    def hears(self, session: int, attempt: str) -> bool:
        """Something runs for a session under this name, its own or another's."""
        return self.of(session, attempt) is not None or (session, attempt) in self._heard

    def named(self, name: str) -> ServedRequest | None:
        """The last attempt of a request."""
        return self._by_name.get(name)

    def owner_of(self, name: str) -> tuple[int, str] | None:
        """The session that hears of a request, and what it calls it."""
        served = self._by_name.get(name)
        return None if served is None or served.owner is None else (served.owner, served.attempt)

    # ---- what happens to a request ----

    def keep(self, served: ServedRequest, output: Output) -> bool:
        """Remembers an output. False: an orphan has said so much that nobody could take it up any more."""
        return served.keep(output, self._max_kept)

    def end(self, served: ServedRequest, output: Output, num_said: int) -> None:
        """Its last output, the last of `num_said` that its session was told. An end that is no answer is not kept."""
        if output.finish_reason in (FinishReason.ERROR, FinishReason.MOVED):
            self._take(served, Turn.BREAK)
            return
        served.finish, served.last_said = output, num_said
        self._take(served, Turn.FINISH, served.owner)
        if served.owner is None and served.sequence_id not in self._orphans:  # of the background: it has no grace
            self._take(served, Turn.WAIT_OUT)

    def written(self, owner: int, num_outputs: int) -> None:
        """The first so many outputs of a session have been written: what they ended is over."""
        ended = self._unwritten.get(owner)
        while ended and ended[0].last_said <= num_outputs:
            self._take(ended[0], Turn.WRITTEN)

    def drop(self, served: ServedRequest) -> bool:
        """Nobody wants it any more. True: it ran."""
        return self._take(served, Turn.DROP) is Effect.STOP

    def wait_out(self, served: ServedRequest) -> bool:
        """Its grace has passed. False: it has not ended, and is to be dropped."""
        if served.state is not State.LEFT:
            return False
        self._take(served, Turn.WAIT_OUT)
        return True

    def join(self, served: ServedRequest, session: int, adopt: Adopt) -> list[Output] | None:
        """A session hears of somebody else's request from a position on; returns what it is to hear at once. None: that is not kept."""
        outputs, attempt = served.since(adopt.position, may_lack_text=True), adopt.request_id
        if outputs is None:
            return None
        if served.state is State.RUNNING:
            served.listeners[session, attempt] = adopt.key
            self._heard[session, attempt] = served
        return [output._replace(request_id=attempt) for output in outputs]

    def leave(self, served: ServedRequest, session: int, attempt: str) -> bytes:
        """A session does not hear of somebody else's request any more; returns the key that it had given."""
        del self._heard[session, attempt]
        return served.listeners.pop((session, attempt))

    def pass_on(self, served: ServedRequest, num_said: Callable[[int], int]) -> bool:
        """Its owner goes; the first of those who hear of it beside him is the owner now. False: there is none."""
        for session, attempt in list(served.listeners):
            key = self.leave(served, session, attempt)
            served.last_said, served.key = num_said(session), key
            self._take(served, Turn.TAKE_UP, session, attempt)
            return True
        return False

    def let_go(self, served: ServedRequest, now: float) -> list[ServedRequest]:
        """Its owner does not want to hear of it any more, and it goes on as one whose session is lost. Returns those that are too
        many now."""
        served.orphaned_s, served.orphaned_at = now, served.end
        self._take(served, Turn.LOSE_SESSION)
        return self._surplus()

    def _surplus(self) -> list[ServedRequest]:
        numbers = list(self._orphans) if self._grace_s == 0 else self._orphan_shares.take_surplus()
        return [self._orphans[number] for number in numbers]

    def orphan(self, owner: int, now: float, num_said: Callable[[int], int]) -> list[ServedRequest]:
        """A session is lost: its requests have no owner from now on, but for those that others hear of. Returns those that are too many, and those that were begun
        anew meanwhile, which nobody could take up."""
        for session, attempt in [each for each in self._heard if each[0] == owner]:
            self.leave(self._heard[session, attempt], session, attempt)
        lost = [*self._owned.get(owner, {}).values(), *self._unwritten.get(owner, ())]
        for served in lost.copy():
            if self.pass_on(served, num_said):
                lost.remove(served)
                continue
            served.orphaned_s, served.orphaned_at = now, served.end
            self._take(served, Turn.LOSE_SESSION)
        too_many = self._surplus()
        return too_many + [each for each in lost if self._by_name.get(each.name) is not each and each not in too_many]

    def adopt(self, adopt: Adopt, owner: int, num_said: int) -> list[Output] | None:
        """Gives a request to a session, which calls it `adopt.request_id` from now on; returns what the session is to hear at once,
        behind the `num_said` outputs that it was told before, from output position `adopt.position` on. None, and nothing
        changes: it is not here, or not kept from there.
        """
        served, attempt = self._by_name.get(adopt.name), adopt.request_id
        outputs = None if served is None else served.since(adopt.position, adopt.joins)
        if served is None or outputs is None:
            return None
        served.last_said, served.key = num_said + len(outputs), adopt.key
        self._take(served, Turn.TAKE_UP, owner, attempt)
        return [output._replace(request_id=attempt) for output in outputs]

    def _take(self, served: ServedRequest, turn: Turn, owner: int | None = None, attempt: str = "") -> Effect | None:
        """Has it happen. From now on the request is the session `owner`'s, which calls it `attempt` (empty: as before)."""
        step = SERVED_REQUEST.step(served.state, turn)
        self._take_from_session(served)
        served.state, served.owner, served.attempt = step.to, owner, attempt or served.attempt
        if step.to not in (State.RUNNING, State.ORPHANED):
            self._running.pop(served.sequence_id, None)
            for listener in list(served.listeners):  # they have heard how it ended
                self.leave(served, *listener)
        if step.to is not State.ORPHANED:
            self._deadlines.remove(served.sequence_id)
        if step.to not in (State.ORPHANED, State.LEFT):
            self._orphans.pop(served.sequence_id, None)
            self._orphan_shares.remove(served.sequence_id)
        if step.to is not State.KEPT:
            self.answers.remove(served)
        if step.to is State.GONE:
            self._forget(served)
        effect: Effect | None = step.action
        match effect:
            case Effect.TELL:
                assert owner is not None
                self._owned.setdefault(owner, {})[served.attempt] = served
            case Effect.AWAIT_WRITING:
                assert owner is not None
                self._unwritten.setdefault(owner, deque()).append(served)
            case Effect.BEGIN_GRACE if step.to is State.ORPHANED and served.is_background:
                pass
            case Effect.BEGIN_GRACE:
                self._orphans[served.sequence_id] = served
                self._orphan_shares.add(served.sequence_id, served.tenant)
            case Effect.KEEP:
                for least in self.answers.add(served):
                    self._take(least, Turn.DROP)
        return effect

    def _forget(self, served: ServedRequest) -> None:
        if self._by_name.get(served.name) is served:
            del self._by_name[served.name]
        if served.job is None:
            return
        of_job = self._by_job.get(served.job.job, {})
        if of_job.get(served.name) is served:
            del of_job[served.name]
            if not of_job:
                del self._by_job[served.job.job]

    def _take_from_session(self, served: ServedRequest) -> None:
        owner = served.owner
        if owner is None:
            return
        if served.state is State.RUNNING:
            owned = self._owned[owner]
            del owned[served.attempt]
            if not owned:
                del self._owned[owner]
        else:
            ended = self._unwritten[owner]
            ended.remove(served)
            if not ended:
                del self._unwritten[owner]

    # ---- time ----

    @property
    def next_due_s(self) -> float:
        """When a request is to end, the oldest orphan's grace ends, or the oldest answer has been kept long enough; infinity: there are
        none."""
        oldest = next(iter(self._orphans.values()), None)
        orphan_s = inf if oldest is None else oldest.orphaned_s + self._grace_s
        return min(self.answers.next_due_s, self._deadlines.next_due_s, orphan_s)

    def past(self, now: float) -> list[ServedRequest]:
        """What was to be done by now and runs still. Where several sessions hear of a request, their routers know until when each."""
        found = [self._running[number] for number in self._deadlines.past(now)]
        return [served for served in found if not served.listeners]

    def drop_old_answers(self, now: float) -> None:
        for served in self.answers.expired(now):
            self._take(served, Turn.DROP)

    def expired(self, now: float) -> list[ServedRequest]:
        """Orphans that nobody has taken up in time."""
        found = []
        for served in self._orphans.values():
            if served.orphaned_s + self._grace_s > now:
                break
            found.append(served)
        return found
