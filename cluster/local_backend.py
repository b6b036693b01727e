"""Runs the HTTP API's requests on one engine in this process, without network and Ray: a router.backend.Backend."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

from router.backend import Lookout, RequestStream, RouterStatus
from router.job_part import NO_JOB, FoundJob, JobPart
from router.requests.journal import Way
from router.roles import RolesReport
from router.wishes import NO_WISHES, Wishes
from workers.config import WorkerConfig
from workers.engine.messages import AddSequence, CancelSequence, Report
from workers.engine.thread import EngineThread
from workers.errors import InvalidRequest, Refusal, Refused
from workers.request import Request
from workers.scheduler.sequence import Kind
from workers.status import ModelInfo, Role, WorkerStatus
from workers.worker import LoadedModel, make_engine

ROUTER_ID = "local"
NO_WORKERS = "there are no workers here"


class LocalBackend:
    """Implements router.backend.Backend. `start` and everything after it on one event loop; what waits is bounded by whoever submits."""

    request_timeout_s = math.inf

    def __init__(self, config: WorkerConfig, model: LoadedModel) -> None:
        self.model: ModelInfo | None = model.info
        self.on_job_ended: Callable[[str], None] = lambda job: None
        self._engine = make_engine(config, model)
        self._max_tokens = model.info.max_model_len
        self._streams: dict[int, RequestStream] = {}
        self._next_id = 0
        self._thread: EngineThread | None = None

    def start(self) -> None:
        self._thread = EngineThread(self._engine, asyncio.get_running_loop(), self._take)
        self._thread.start()

    async def stop(self) -> None:
        if self._thread is not None:
            await self._thread.stop()
        self._engine.close()

    def is_ready(self) -> bool:
        return self._thread is not None

    def submit(self, request: Request, wishes: Wishes = NO_WISHES, part: JobPart = NO_JOB) -> RequestStream:
        if self._thread is None:
            raise Refused(Refusal.SHUTTING_DOWN, "the engine does not run")
        self._engine.check(request)
        self._next_id += 1
        sequence_id = self._next_id
        stream = RequestStream(request.request_id, self._max_tokens, lambda _: self._cancel(sequence_id))
        concrete = replace(request, params=request.params.with_seed(sequence_id))
        if not self._thread.post(AddSequence(sequence_id, concrete, Kind.LOCAL, None)):
            raise Refused(Refusal.QUEUE_FULL, "too many requests at once", retry_after_s=1.0)
        self._streams[sequence_id] = stream
        return stream

    async def find(self, job: str, ends: bool = False) -> FoundJob:
        return FoundJob()

    def status(self) -> RouterStatus:
        return RouterStatus(ROUTER_ID, (), 0, len(self._streams))

    async def set_role(
        self, worker_id: str, role: Role, force: bool = False, is_pinned: bool | None = None
    ) -> WorkerStatus:
        raise InvalidRequest(NO_WORKERS, "worker_id")

    async def set_draining(self, worker_id: str, is_draining: bool, force: bool = False) -> WorkerStatus:
        raise InvalidRequest(NO_WORKERS, "worker_id")

    async def set_pinned(self, worker_id: str, is_pinned: bool) -> None:
        raise InvalidRequest(NO_WORKERS, "worker_id")

    def lookout(self) -> Lookout:
        return Lookout()

    def ways_of(self, asked: str) -> tuple[float, tuple[Way, ...]]:
        return 0.0, ()

    def role_report(self) -> RolesReport:
        return RolesReport()

    def _take(self, report: Report) -> None:
        for sequence_id, output in report.result.outputs:
            stream = self._streams.get(sequence_id)
            if stream is None:
                continue
            if output.finish_reason is not None:
                del self._streams[sequence_id]
            stream.push(output)

    def _cancel(self, sequence_id: int) -> None:
        self._streams.pop(sequence_id, None)
        if self._thread is not None:
            self._thread.post(CancelSequence(sequence_id))
