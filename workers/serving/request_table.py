"""The requests of one worker: whose each is, what was said of it lately, and what outlives its router. Knows no stream, no engine and no batch.

A request belongs to the worker. Its owner is the session that hears of it; a request whose session is lost has none, goes on for a
grace, and can be taken up by another session from the output that its client has. So can what has ended meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

from workers.request import FinishReason, Output, Request
from workers.status import WorkerAddress
from workers.wire.attach import Adopt, Migration


@dataclass(slots=True, eq=False)
class ServedRequest:
    """One request that was accepted. `kept` are its last outputs, under whatever name they were said."""

    sequence_id: int
    name: str
    """The same for all its attempts, wherever they run."""
    attempt: str
    """What its owner calls it; the last owner, when there is none."""
    request: Request
    candidates: tuple[WorkerAddress, ...]
    """Who is to compute its prompt, best first; none: this worker."""
    migration: Migration | None
    """Where it ran before, when it is taken over from there."""
    due_s: float
    """When its first token is due; infinity when nobody said."""
    owner: int | None
    """The session that hears of it; None: it is an orphan."""
    key: bytes
    """Who has a permit made with it may take the request over."""
    end: int
    """Position that the next output has: tokens said here, or given with the request."""
    kept: deque[Output] = field(default_factory=deque)
    num_kept: int = 0
    """Entries of `kept`: see RequestTable."""
    dropped: int = -1
    """Position of the last output that is kept no more. What else was said at that position is no use without it."""
    finish: Output | None = None
    """How it ended."""
    orphaned_s: float = 0.0
    orphaned_at: int = 0
    """`end` when its session was lost."""

    @property
    def first_kept(self) -> int:
        """Position from which on it can be taken up."""
        return max(self.dropped + 1, self.kept[0].position if self.kept else self.end)


class RequestTable:
    """At most `max_kept_tokens` entries are kept of each request (a token is one, each alternative among logprobs another), and at
    most `max_orphans` requests without a session, each for `orphan_grace_s`.

    An attempt's name belongs to its session: two routers may use the same one.
    """

    def __init__(self, max_kept_tokens: int, max_orphans: int, orphan_grace_s: float) -> None:
        self._max_kept = max_kept_tokens
        self._max_orphans = max_orphans
        self._grace_s = orphan_grace_s
        self._running: dict[int, ServedRequest] = {}
        self._by_name: dict[str, ServedRequest] = {}
        """The last attempt of each; also those that have ended and can be taken up."""
        self._owned: dict[int, dict[str, ServedRequest]] = {}
        self._unwritten: dict[int, deque[tuple[int, ServedRequest]]] = {}
        """By session what has ended, with the frame that says so, as long as that has not been written."""
        self._orphans: dict[int, ServedRequest] = {}
        """By sequence id, the oldest first."""

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
        self._owned.setdefault(served.owner, {})[served.attempt] = served

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

    # ---- outputs ----

    def keep(self, served: ServedRequest, output: Output) -> bool:
        """Remembers an output. False: an orphan has said so much that nobody could take it up any more."""
        served.kept.append(output)
        served.num_kept += _num_entries(output)
        served.end = output.position + len(output.token_ids)
        while served.num_kept > self._max_kept:
            served.dropped = served.kept[0].position
            served.num_kept -= _num_entries(served.kept.popleft())
        while (
            served.kept and served.kept[0].position == served.dropped
        ):  # the scores of a prompt come in several outputs
            served.num_kept -= _num_entries(served.kept.popleft())
        return served.owner is not None or served.first_kept <= served.orphaned_at

    def end(self, served: ServedRequest, output: Output, num_said: int) -> None:
        """Its last output, the last of `num_said` that its session was told. An end that is no answer is not kept."""
        del self._running[served.sequence_id]
        if output.finish_reason in (FinishReason.ERROR, FinishReason.MOVED):
            self._disown(served)
            self._forget(served)
            return
        served.finish = output
        if served.owner is not None:
            owner = served.owner
            self._disown(served)
            self._unwritten.setdefault(owner, deque()).append((num_said, served))

    def written(self, owner: int, num_outputs: int) -> None:
        """The first so many outputs of a session have been written: what they ended is over."""
        ended = self._unwritten.get(owner)
        while ended and ended[0][0] <= num_outputs:
            self._forget(ended.popleft()[1])

    # ---- owners ----

    def drop(self, served: ServedRequest) -> bool:
        """Nobody wants it any more. True: it ran."""
        self._forget(served)
        self._disown(served)
        return self._running.pop(served.sequence_id, None) is not None

    def orphan(self, owner: int, now: float) -> list[ServedRequest]:
        """A session is lost: its requests have no owner from now on. Returns those that are too many, and those that were begun
        anew meanwhile, which nobody could take up."""
        lost = [*self._owned.pop(owner, {}).values(), *(served for _, served in self._unwritten.pop(owner, ()))]
        for served in lost:
            served.owner, served.orphaned_s, served.orphaned_at = None, now, served.end
            self._orphans[served.sequence_id] = served
        num_too_many = len(self._orphans) if self._grace_s == 0 else max(0, len(self._orphans) - self._max_orphans)
        too_many = list(self._orphans.values())[:num_too_many]
        return too_many + [each for each in lost if self._by_name.get(each.name) is not each and each not in too_many]

    def adopt(self, adopt: Adopt, owner: int, num_said: int) -> list[Output] | None:
        """Gives a request to a session, which calls it `adopt.request_id` from now on; returns what the session is to hear at once,
        behind the `num_said` outputs that it was told before, from output position `adopt.position` on. None, and nothing
        changes: it is not here, or not kept from there.
        """
        served, attempt = self._by_name.get(adopt.name), adopt.request_id
        outputs = None if served is None else _since(served, adopt.position)
        if served is None or outputs is None:
            return None
        self._disown(served)
        served.owner, served.attempt, served.key = owner, attempt, adopt.key
        if served.finish is None:
            self._owned.setdefault(owner, {})[attempt] = served
        else:
            self._unwritten.setdefault(owner, deque()).append((num_said + len(outputs), served))
        return [output._replace(request_id=attempt) for output in outputs]

    def owner_of(self, name: str) -> tuple[int, str] | None:
        """The session that hears of a request, and what it calls it."""
        served = self._by_name.get(name)
        return None if served is None or served.owner is None else (served.owner, served.attempt)

    def _disown(self, served: ServedRequest) -> None:
        """No session has it, and none has left it behind."""
        self._orphans.pop(served.sequence_id, None)
        if served.owner is None:
            return
        owned = self._owned.get(served.owner, {})
        if owned.get(served.attempt) is served:
            del owned[served.attempt]
            if not owned:
                del self._owned[served.owner]
        ended = self._unwritten.get(served.owner)
        if ended:
            self._unwritten[served.owner] = deque(entry for entry in ended if entry[1] is not served)

    def _forget(self, served: ServedRequest) -> None:
        """It cannot be taken up any more."""
        if self._by_name.get(served.name) is served:
            del self._by_name[served.name]

    # ---- time ----

    @property
    def next_due_s(self) -> float:
        """When the oldest orphan's grace ends; infinity: there is none."""
        oldest = next(iter(self._orphans.values()), None)
        return inf if oldest is None else oldest.orphaned_s + self._grace_s

    def expired(self, now: float) -> list[ServedRequest]:
        """Orphans that nobody has taken up in time."""
        found = []
        for served in self._orphans.values():
            if served.orphaned_s + self._grace_s > now:
                break
            found.append(served)
        return found


def _since(served: ServedRequest, position: int) -> list[Output] | None:
    """Its outputs from a position on. None: they are not kept, or none begins there."""
    if position <= served.dropped:
        return None
    outputs = [output for output in served.kept if output.position >= position]
    if outputs and outputs[0].position == position:
        return outputs
    if position != served.end:
        return None
    if served.finish is None:
        return []
    # The client has every token and all of its text: only how it ended is missing.
    finish = served.finish
    return [Output(served.attempt, position, finish_reason=finish.finish_reason, stop_reason=finish.stop_reason)]


def _num_entries(output: Output) -> int:
    """What it takes to keep it: tokens, and alternatives of logprobs."""
    entries = len(output.token_ids) or 1
    entries += sum(len(logprob.top) for logprob in output.logprobs)
    return entries + sum(part.token_ids.size + part.top_ids.size for part in output.prompt_logprobs)
