"""Simulated clients: send the requests of a trace, compare what comes with what must come, and keep the record of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from cluster.sim.load import TraceRequest
from cluster.sim.product import (
    FinishReason,
    HandoffReport,
    InvariantViolated,
    Output,
    Request,
    Salts,
    SamplingParams,
    Wishes,
)
from cluster.sim.profiles.profile import Profile
from cluster.sim.record import RequestRecord
from cluster.sim.router import SimRouter
from cluster.sim.timeline import Timeline
from cluster.sim.tokens import output_run

RETRY_S = 0.2
"""A client whose router is gone asks another one after so long, by the same name."""


class Routers(Protocol):
    def pick(self, number: int) -> SimRouter | None:
        """A router that takes requests; None: there is none now."""
        ...


@dataclass(slots=True, eq=False)
class _Waiting:
    """A client that waits for its answer."""

    number: int
    asked: TraceRequest
    request: Request
    arrived_s: float
    router: SimRouter | None = None
    num_tokens: int = 0
    """That the client has."""
    position: int = 0
    """Of the next output of the router that it asks now."""
    first_s: float | None = None
    last_s: float = 0.0
    max_gap_s: float = 0.0
    sent_s: float | None = None
    cached_tokens: int = 0
    report: HandoffReport | None = None


@dataclass(slots=True)
class Targets:
    """Seconds; None: the client does not care."""

    ttft_s: float | None = None
    tpot_s: float | None = None


class Clients:
    """All clients of a simulation. A prompt is made when it is sent, and forgotten with its request."""

    def __init__(
        self, timeline: Timeline, routers: Routers, trace: Iterator[TraceRequest], targets: Targets, profile: Profile
    ) -> None:
        self.records: list[RequestRecord] = []
        self.num_asked = 0
        self.has_asked_all = False
        self.asked_at_s = 0.0
        """When the last request so far was sent."""
        self.num_tokens = 0
        self.waiting: dict[str, _Waiting] = {}
        self.hang_ups: dict[int, int] = {}
        """Of those who wait and will leave: by seed, after how many tokens."""
        self._timeline = timeline
        self._routers = routers
        self._trace = trace
        self._targets = targets
        self._router_s = profile.router_s
        self._connect_s = profile.connect_s
        self._token_s = profile.router_token_s
        self._begin_s = 0.0
        self._salts = Salts(b"simulated")

    def start(self, begin_s: float) -> None:
        """The trace begins at that time."""
        self._begin_s = begin_s
        self._next()

    def _next(self) -> None:
        asked = next(self._trace, None)
        if asked is None:
            self.has_asked_all = True
        else:
            self._timeline.at(self._begin_s + asked.at_s, self._ask, asked)

    def _ask(self, asked: TraceRequest) -> None:
        self.num_asked += 1
        number, now = self.num_asked, self._timeline.now
        self.asked_at_s = now
        params = SamplingParams(max_tokens=asked.output_tokens, temperature=0.0, seed=number, ignore_eos=True)
        salt = self._salts.of(asked.tenant)
        request = Request(f"r{number}", asked.prompt(), params, cache_salt=salt)
        waiting = self.waiting[request.request_id] = _Waiting(number, asked, request, now, last_s=now)
        if asked.hangs_up_after is not None:
            self.hang_ups[number] = asked.hangs_up_after
        self._send(waiting)
        self._next()

    def _send(self, waiting: _Waiting) -> None:
        router = waiting.router = self._routers.pick(waiting.number)
        waiting.position = 0
        if router is None:
            self._timeline.after(RETRY_S, self._send_again, waiting)
        else:
            wishes = Wishes(timeout_s=waiting.asked.timeout_s, tenant=waiting.asked.tenant)
            self._timeline.after(self._on_its_way_s(waiting), router.submit, waiting.request, wishes)

    def _on_its_way_s(self, waiting: _Waiting) -> float:
        """From a client's wish to the router's hearing of it."""
        return self._connect_s + self._token_s * waiting.asked.prompt_tokens + self._router_s

    def _send_again(self, waiting: _Waiting) -> None:
        if self.waiting.get(waiting.request.request_id) is waiting:
            self._send(waiting)

    def router_died(self, router: SimRouter) -> None:
        """Its connections break: those who waited there ask again, and have what they have."""
        for waiting in self.waiting.values():
            if waiting.router is router:
                waiting.router = None
                self._timeline.after(RETRY_S, self._send_again, waiting)

    def submitted(self, name: str) -> None:
        """A router has sent the request to a worker."""
        waiting = self.waiting.get(name)
        if waiting is not None and waiting.sent_s is None:
            waiting.sent_s = self._timeline.now

    def delivered(self, router: SimRouter, output: Output) -> None:
        """A router says something to a client; it is there a moment later."""
        waiting = self.waiting.get(output.request_id)
        if waiting is None or waiting.router is not router:
            return
        self._check(waiting, output)
        now = self._timeline.now + self._router_s
        count = len(output.token_ids)
        waiting.position += count
        num_new = waiting.position - waiting.num_tokens
        if num_new > 0:
            self.num_tokens += num_new
            waiting.num_tokens = waiting.position
            if waiting.first_s is None:
                waiting.first_s = now
            else:
                waiting.max_gap_s = max(waiting.max_gap_s, (now - waiting.last_s) / num_new)
            waiting.last_s = now
        if output.handoff is not None:
            waiting.report, waiting.cached_tokens = output.handoff, output.cached_tokens
        if output.finish_reason is not None:
            is_error = output.finish_reason is FinishReason.ERROR
            refusal = output.refusal.value if output.refusal is not None else "internal_error"
            self._end(waiting, refusal if is_error else "ok", now)
        elif waiting.asked.hangs_up_after is not None and waiting.num_tokens >= waiting.asked.hangs_up_after:
            self._timeline.after(2 * self._router_s, router.cancel, output.request_id)
            self._end(waiting, "cancelled", now)

    def rejected(self, name: str, refusal: str) -> None:
        waiting = self.waiting.get(name)
        if waiting is not None:
            self._end(waiting, refusal, self._timeline.now + self._router_s)

    def _check(self, waiting: _Waiting, output: Output) -> None:
        """No token lost, repeated or changed."""
        name, tokens = output.request_id, output.token_ids
        if tokens and output.position != waiting.position:
            raise InvariantViolated(f"{name}: output {output.position} came where {waiting.position} was due")
        if tokens != output_run(waiting.number, waiting.position, len(tokens)):
            raise InvariantViolated(f"{name}: other tokens than those of the request from {waiting.position} on")
        total = waiting.position + len(tokens)
        is_done = output.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
        if total > waiting.asked.output_tokens or (is_done and total != waiting.asked.output_tokens):
            raise InvariantViolated(f"{name}: {total} tokens where {waiting.asked.output_tokens} were asked for")

    def _end(self, waiting: _Waiting, outcome: str, at_s: float) -> None:
        del self.waiting[waiting.request.request_id]
        self.hang_ups.pop(waiting.number, None)
        report, begin_s = waiting.report, self._begin_s
        at_worker_s = report.queue_s if report is not None else 0.0
        sent_s = waiting.sent_s if waiting.sent_s is not None else at_s
        first_s = waiting.first_s
        self.records.append(
            RequestRecord(
                name=waiting.request.request_id,
                arrival_s=waiting.arrived_s - begin_s,
                prompt_tokens=waiting.asked.prompt_tokens,
                cached_tokens=waiting.cached_tokens,
                output_tokens=waiting.num_tokens,
                first_token_s=None if first_s is None else first_s - begin_s,
                finished_s=at_s - begin_s,
                queue_s=max(0.0, sent_s - waiting.arrived_s - self._on_its_way_s(waiting)) + at_worker_s,
                transfer_s=report.exposed_s if report is not None else 0.0,
                prefill_worker=report.prefill_worker if report is not None else "",
                decode_worker=report.decode_worker if report is not None else "",
                outcome=outcome,
                ttft_target_s=self._targets.ttft_s,
                tpot_target_s=self._targets.tpot_s,
                max_gap_s=waiting.max_gap_s,
            )
        )
