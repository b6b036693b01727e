"""Whose request it is: what its tenant may ask for, whether it may ask now, and what is written down of it in the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from router.api.job_progress import JobProgress
from router.api.problems import Problem, Rejected, Row, rejected
from router.api.tenant_metrics import TenantMetrics
from router.api.translate import Job, read_timeout
from router.tenants.rations import BUCKETS, Kind, Reading, Shortage
from router.tenants.tenancy import Caller, Limited, Tenancy
from router.tenants.usage import Usage
from router.tenants.usage_log import UsageLog
from workers.errors import InvalidRequest, Refusal

NOBODY = Caller()
RATE_HEADERS = "rate_headers"
"""Of a request's state: what its answer says of its tenant's allowances."""
_UNITS = {
    Kind.REQUESTS: "requests a minute",
    Kind.INPUT: "prompt tokens a minute",
    Kind.OUTPUT: "output tokens a minute",
    Kind.CONCURRENT: "requests at once",
}


def caller_of(scope: Scope) -> Caller:
    """Who the door has let in."""
    caller: Caller = scope.get("state", {}).get("caller", NOBODY)
    return caller


def owner_of(scope: Scope) -> str:
    """Who may ask for it again: whoever is let in as the same."""
    return caller_of(scope).owner.hex()


def may_use(caller: Caller, model: str) -> bool:
    return not caller.limits.models or model in caller.limits.models


class Callers:
    """What the endpoints of one router ask of its tenants. `expected_output_tokens`: of an answer, before it is there."""

    def __init__(
        self, tenancy: Tenancy, metrics: TenantMetrics, expected_output_tokens: int, usage_log: UsageLog | None = None
    ) -> None:
        self.tenancy = tenancy
        self.usage_log = usage_log
        self.metrics = metrics
        self._expected_output_tokens = expected_output_tokens

    def own(self, job: Job, scope: Scope) -> Job:
        """The job as its caller's: named blocks, place in line, deadline. Raises Rejected (403) for a model, InvalidRequest for a
        priority that its tenant may not use."""
        caller = caller_of(scope)
        limits = caller.limits
        if not may_use(caller, job.model):
            raise rejected(403, "model_not_allowed", f"this key's tenant may not use the model {job.model!r}", "model")
        priority = job.priority
        if priority is None:
            priority = min(limits.max_priority, max(limits.min_priority, 0))
        elif not limits.min_priority <= priority <= limits.max_priority:
            raise InvalidRequest(
                f"priority must be between {limits.min_priority} and {limits.max_priority} for this key", "priority"
            )
        wishes = job.wishes
        asked_s = read_timeout(Headers(scope=scope).get("x-request-timeout"), wishes.timeout_s)
        salt = self.tenancy.salt(caller, job.cache_salt) if caller.tenant or job.cache_salt else 0
        session = (wishes.session ^ self.tenancy.salts.of(caller.tenant)) if wishes.session else 0
        requests, first = job.requests, job.requests[0]
        if (first.priority, first.cache_salt) != (priority, salt):  # they are alike in it
            requests = tuple([replace(request, priority=priority, cache_salt=salt) for request in requests])
        said = (wishes.session, wishes.timeout_s, wishes.tenant, wishes.weight)
        if said != (session, asked_s, caller.tenant, limits.weight):
            wishes = replace(wishes, session=session, timeout_s=asked_s, tenant=caller.tenant, weight=limits.weight)
        if requests is job.requests and wishes is job.wishes:
            return job
        return replace(job, requests=requests, wishes=wishes)

    async def admit(self, job: Job, scope: Scope, is_joined: bool = False, goes_on: bool = False) -> Account:
        """Returns when the tenant's allowances have paid for the job; `is_joined`: its tokens have been paid for by who sent it
        first; `goes_on`: it runs on, and can be joined, when its client has gone. Raises Rejected (429)."""
        account = Account(self, caller_of(scope), job, scope, is_joined, goes_on)
        await account.open()
        return account

    def costs(self, job: Job) -> dict[Kind, float]:
        """What is paid for before anything has run."""
        expected = sum(min(request.params.max_tokens, self._expected_output_tokens) for request in job.requests)
        return {
            Kind.REQUESTS: 1,
            Kind.INPUT: sum(len(prompt.token_ids) for prompt in job.prompts),
            Kind.OUTPUT: expected,
        }


class Account:
    """Of one job, from its admission to its end."""

    def __init__(
        self, callers: Callers, caller: Caller, job: Job, scope: Scope, is_joined: bool, goes_on: bool
    ) -> None:
        self._callers = callers
        self._caller = caller
        self._job = job
        self._scope = scope
        self._begun_s = time.monotonic()
        self._is_joined = is_joined
        self._goes_on = goes_on
        self._costs = {Kind.REQUESTS: 1.0, Kind.INPUT: 0.0, Kind.OUTPUT: 0.0} if is_joined else callers.costs(job)
        limit = caller.limits.output_tokens_per_min
        if limit:  # one answer may be longer than an allowance
            self._costs[Kind.OUTPUT] = min(self._costs[Kind.OUTPUT], limit)
        self.progress: JobProgress | None = None
        """Once it runs."""
        self._has_place = True
        """Of its tenant's max_concurrent, once it is open."""
        self._is_closed = False

    async def open(self) -> None:
        """As Callers.admit."""
        caller, tenancy = self._caller, self._callers.tenancy
        if not caller.tenant:
            return
        try:
            await tenancy.admit(caller, self._costs)
        except Limited as error:
            self._callers.metrics.limited(caller.tenant, error.shortage.kind)
            raise _too_many(error.shortage) from error
        finally:
            self._scope.setdefault("state", {})[RATE_HEADERS] = rate_headers(tenancy.readings(caller))

    def give_place(self) -> bool:
        """Its place is free for another request of its tenant; what it uses is paid for when it is closed. False: it had none any
        more."""
        if self._is_closed or not self._has_place:
            return False
        self._has_place = False
        if self._caller.tenant:
            self._callers.tenancy.end(self._caller, {})
        return True

    def take_place_back(self) -> None:
        """That it has given, unless it has ended."""
        if not self._is_closed and not self._has_place:
            self._has_place = True
            if self._caller.tenant:
                self._callers.tenancy.end(self._caller, {}, num_places=-1)

    def close(self, outcome: str, is_whole: bool = False) -> None:
        """The job has ended. `outcome` as in Usage; one that did not begin costs its tenant nothing. `is_whole`: it has run to its end
        all the same."""
        caller, job = self._caller, self._job
        self._is_closed = True
        progress = None if self._is_joined else self.progress
        if self._is_joined:
            outcome = "joined" if outcome == "ok" else outcome
        num_output = 0 if progress is None else progress.completion_tokens
        if caller.tenant:
            if progress is None and not self._is_joined:
                extra = {kind: -self._costs[kind] for kind in BUCKETS}
            else:
                extra = {Kind.OUTPUT: num_output - self._costs[Kind.OUTPUT]}
                if self._goes_on and outcome == "client_disconnected" and not is_whole:
                    # Nobody tells here how it goes on, and who joins it pays nothing: what was expected stays paid.
                    extra[Kind.OUTPUT] = max(0.0, extra[Kind.OUTPUT])
            self._callers.tenancy.end(caller, extra, int(self._has_place))
            num_cached = 0 if progress is None else progress.cached_tokens
            num_input = 0 if progress is None else progress.prompt_tokens
            self._callers.metrics.ended(caller.tenant, outcome, num_input, num_cached, num_output)
        if self._callers.usage_log is not None:
            self._callers.usage_log.write(_usage(caller, job, self._scope, progress, outcome, self._begun_s))


def _usage(caller: Caller, job: Job, scope: Scope, progress: JobProgress | None, outcome: str, begun_s: float) -> Usage:
    choices = () if progress is None else progress.choices
    reports = [choice.handoff for choice in choices if choice.handoff is not None]
    first = [choice.first_s for choice in choices if choice.first_s is not None]
    return Usage(
        ended_s=round(time.time(), 3),
        request_id=scope.get("state", {}).get("request_id", job.job_id),
        tenant=caller.tenant,
        key_id=caller.key_id,
        endpoint=scope["path"],
        model=job.model,
        outcome=outcome,
        prompt_tokens=0 if progress is None else progress.prompt_tokens,
        cached_tokens=0 if progress is None else progress.cached_tokens,
        completion_tokens=0 if progress is None else progress.completion_tokens,
        ttft_s=round(min(first) - begun_s, 6) if first else None,
        total_s=round(time.monotonic() - begun_s, 6),
        prefill_workers=tuple(dict.fromkeys(report.prefill_worker for report in reports)),
        decode_workers=tuple(dict.fromkeys(report.decode_worker for report in reports)),
    )


def _too_many(shortage: Shortage) -> Rejected:
    """Two kinds of 429: later it may pass, or it never will."""
    what = f"{shortage.limit} {_UNITS[shortage.kind]}"
    if shortage.wait_s is None:
        message = f"the request needs {shortage.wanted:.0f}; its key's tenant has {what}: send a smaller one"
        row = Row(429, "rate_limit_error", False)
    else:
        message = f"the tenant of this key has used its {what}; send the request again in {shortage.wait_s:.1f} s"
        row = Row(429, "rate_limit_error", True, shortage.wait_s)
    return Rejected(Problem(row, message, "rate_limit_exceeded", None, Refusal.RATE_LIMITED.value))


def rate_headers(readings: list[Reading]) -> list[tuple[bytes, bytes]]:
    """As OpenAI's API has them: requests, and tokens, of which the scarcer of prompt's and answers' are told; and each of the two."""
    by_kind = {reading.kind: reading for reading in readings}
    tokens = [by_kind[kind] for kind in (Kind.INPUT, Kind.OUTPUT) if kind in by_kind]
    told: Mapping[str, Reading] = {str(kind): reading for kind, reading in by_kind.items()}
    if tokens:
        told = {**told, "tokens": min(tokens, key=lambda reading: reading.remaining / reading.limit)}
    headers: list[tuple[bytes, bytes]] = []
    for name, reading in told.items():
        values: tuple[tuple[str, Any], ...] = (
            ("limit", reading.limit),
            ("remaining", reading.remaining),
            ("reset", duration(reading.reset_s)),
        )
        headers += [(f"x-ratelimit-{what}-{name}".encode(), str(value).encode()) for what, value in values]
    return headers


def duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{max(0, round(seconds * 1000))}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}m{round(rest)}s" if minutes else f"{rest:.3g}s"
