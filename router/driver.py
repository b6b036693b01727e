"""Runs the router core on asyncio: carries frames and requests in, messages and outputs out. Decides nothing."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import assert_never

from router.backend import ListedRouter, LoadingWorker, Lookout, RequestStream, RouterStatus, WorkerView
from router.config import RouterConfig
from router.core import RouterCore
from router.events import (
    Attach,
    Command,
    Deliver,
    Detach,
    Event,
    Explain,
    FrameArrived,
    JobEnded,
    JobSought,
    Reject,
    RequestArrived,
    RequestCancelled,
    SendMessage,
    ShutDown,
    TellFound,
    Tick,
    WorkerDetached,
    WorkersChanged,
)
from router.fleet.seen import WorkerSeen, workers_seen
from router.fleet.worker_entry import WorkerEntry
from router.job_part import NO_JOB, FoundJob, JobPart
from router.policies.catalogue import policy_named
from router.policies.policy import Policy
from router.requests.demand import DemandReport
from router.requests.journal import Way
from router.roles import Order, RoleDesk, RolesReport
from router.wishes import NO_WISHES, Wishes
from workers.errors import InvalidConfig, InvalidRequest, Refusal, Refused, WorkerLost
from workers.request import Request
from workers.status import ModelInfo, Role, WorkerAddress, WorkerStatus
from workers.trust.credentials import Credentials
from workers.wire.attach import WorkerClient, WorkerLink
from workers.wire.grpc_client import FINISH_S, GrpcWorkerClient

logger = logging.getLogger(__name__)


def make_policy(config: RouterConfig) -> Policy:
    """The policy that the config names."""
    return policy_named(config.policy, config.max_prefill_candidates, config.policy_seed)


class RouterDriver:
    """A Backend over workers. Every method is called from the event loop that `start` ran in."""

    def __init__(
        self,
        config: RouterConfig,
        router_id: str,
        client: WorkerClient | None = None,
        clock: Callable[[], float] = time.monotonic,
        credentials: Credentials | None = None,
        desk: RoleDesk | None = None,
    ) -> None:
        """`desk` carries operators' orders out; without one they go to the workers at once."""
        self._desk = desk
        self._roles = RolesReport()
        self._config = config
        self._router_id = router_id
        self._client = client or GrpcWorkerClient(
            config.max_pending_messages, config.set_role_timeout_s, clock, credentials
        )
        self._clock = clock
        self._core = RouterCore(config, make_policy(config), secrets.token_bytes(32))
        self._streams: dict[str, RequestStream] = {}
        self.on_job_ended: Callable[[str], None] = lambda job: None
        self._sought: dict[int, asyncio.Future[FoundJob]] = {}
        self._num_sought = 0
        self._links: dict[int, WorkerLink] = {}
        self._readers: dict[int, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None
        self._status_changed = asyncio.Event()
        self._loading: tuple[LoadingWorker, ...] = ()
        self._routers: tuple[ListedRouter, ...] = ()

    # ---- life ----

    async def start(self) -> None:
        """Begins to connect and to watch the clock."""
        self._ticker = asyncio.create_task(self._tick(), name="router-tick")

    async def stop(self) -> None:
        """Ends every request with SHUTTING_DOWN, then closes every stream."""
        self._handle(ShutDown())
        if self._ticker is not None:
            self._ticker.cancel()
            self._closing.add(self._ticker)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def set_workers(self, addresses: Iterable[WorkerAddress]) -> None:
        """The cluster's members now are these."""
        self._handle(WorkersChanged(tuple(addresses)))

    def set_loading(self, loading: tuple[LoadingWorker, ...]) -> None:
        """These are on their way."""
        self._loading = loading

    def set_routers(self, routers: tuple[ListedRouter, ...]) -> None:
        """The cluster's routers are these."""
        self._routers = routers

    async def _tick(self) -> None:
        while True:
            try:
                self._handle(Tick())
            except Exception:
                logger.exception("a tick could not be handled")
            await asyncio.sleep(self._config.tick_s)

    # ---- Backend ----

    @property
    def model(self) -> ModelInfo | None:
        return self._core.fleet.model

    def is_ready(self) -> bool:
        return self._core.fleet.can_decode

    @property
    def request_timeout_s(self) -> float:
        return self._config.request_timeout_s

    async def wait_ready(self) -> None:
        """Until some worker can decode. Without an end where none comes."""
        while not self.is_ready():
            await self._status_changed.wait()

    async def find(self, job: str, ends: bool = False) -> FoundJob:
        number = self._num_sought = self._num_sought + 1
        asked: asyncio.Future[FoundJob] = asyncio.get_running_loop().create_future()
        self._sought[number] = asked
        try:
            self._handle(JobSought(number, job, ends))
            async with asyncio.timeout(2 * self._config.find_timeout_s):
                return await asked
        except TimeoutError:  # this router is about to end, and does not look at the time any more
            return FoundJob()
        finally:
            del self._sought[number]

    def submit(self, request: Request, wishes: Wishes = NO_WISHES, part: JobPart = NO_JOB) -> RequestStream:
        name = request.request_id
        if name in self._streams:
            raise InvalidRequest(f"request id {name!r} is in use", "request_id")
        # What is taken up comes at once, as far as it has come.
        max_tokens = self._config.max_buffered_tokens + (request.params.max_tokens if part.at else 0)
        stream = self._streams[name] = RequestStream(name, max_tokens, self._leave)
        try:
            rejection = self._handle(RequestArrived(request, wishes, part))
        except BaseException:
            self._streams.pop(name, None)
            raise
        if rejection is None:
            return stream
        del self._streams[name]
        if rejection.refusal is Refusal.INVALID:
            raise InvalidRequest(rejection.message, rejection.param)
        raise Refused(rejection.refusal, rejection.message, rejection.retry_after_s)

    def status(self) -> RouterStatus:
        now = self._clock()
        core = self._core
        workers = tuple(
            WorkerView(
                status=status,
                connected=entry.is_up,
                frame_age_s=max(0.0, now - entry.last_frame_s),
                num_requests=len(entry.attempts),
                speed=float(core.fleet.table.speeds[entry.row]),
            )
            for entry in core.fleet
            if (status := entry.status_now()) is not None
        )
        counters = dict(core.counters)
        counters["prefix_index_blocks"] = len(core.index)
        counters["prefix_index_evicted"] = core.index.num_evicted
        named = tuple((name, float(value)) for name, value in sorted(counters.items()))
        flights = core.flights
        return RouterStatus(
            self._router_id,
            workers,
            flights.num_waiting,
            flights.num_running,
            named,
            core.forecasts.status(),
            self._loading,
            self._routers,
        )

    def lookout(self) -> Lookout:
        now, flights = self._clock(), self._core.flights
        return Lookout(now, flights.ages(now), flights.oldest(), flights.journal.faults())

    def ways_of(self, asked: str) -> tuple[float, tuple[Way, ...]]:
        return self._clock(), self._core.flights.ways_of(asked)

    async def set_role(
        self, worker_id: str, role: Role, force: bool = False, is_pinned: bool | None = None
    ) -> WorkerStatus:
        entry = self._core.fleet.check_role(worker_id, role, force)
        change: Awaitable[object] = (
            self._desk.carry_out(Order(worker_id, role, is_pinned=is_pinned, force=force))
            if self._desk is not None
            else self._client.set_role(entry.address, role, entry.generation)
        )
        return await self._changed(entry, change, lambda status: status.role is role, f"become {role}")

    async def set_draining(self, worker_id: str, is_draining: bool, force: bool = False) -> WorkerStatus:
        entry = self._core.fleet.check_draining(worker_id, is_draining, force)
        change: Awaitable[object] = (
            self._desk.carry_out(Order(worker_id, is_draining=is_draining, force=force))
            if self._desk is not None
            else self._client.set_draining(entry.address, is_draining)
        )
        what = "drain" if is_draining else "take work again"
        return await self._changed(entry, change, lambda status: status.is_draining is is_draining, what)

    async def set_pinned(self, worker_id: str, is_pinned: bool) -> None:
        if self._desk is None:
            raise InvalidRequest("no role controller runs here, so nothing is to be pinned", "pin")
        await self._desk.carry_out(Order(worker_id, is_pinned=is_pinned))

    def role_report(self) -> RolesReport:
        return self._roles

    async def show_roles(self, report: RolesReport) -> None:
        """What operators are told of roles from now on."""
        self._roles = report

    # ---- the role controller ----

    async def look(self) -> tuple[tuple[WorkerSeen, ...], DemandReport, float]:
        """The workers, what is asked of this router, and what a handoff adds to a first token, in seconds."""
        core = self._core
        return workers_seen(core.fleet), core.flights.demand(self._clock()), core.forecasts.handoffs.fixed_s

    async def tell_role(self, worker_id: str, role: Role, generation: int) -> None:
        """Has a worker take a role, from that generation or not at all. Raises Refused, InvalidRequest, WorkerLost."""
        await self._client.set_role(self._address_of(worker_id), role, generation)

    async def tell_draining(self, worker_id: str, is_draining: bool) -> None:
        """Has a worker take no new work, or take it again. Raises as `tell_role`."""
        await self._client.set_draining(self._address_of(worker_id), is_draining)

    def _address_of(self, worker_id: str) -> WorkerAddress:
        entry = self._core.fleet.get(worker_id)
        if entry is None:
            raise WorkerLost(f"worker {worker_id} is no member")
        return entry.address

    async def _changed(
        self,
        entry: WorkerEntry,
        change: Awaitable[object],
        is_done: Callable[[WorkerStatus], bool],
        what: str,
    ) -> WorkerStatus:
        """Has a worker change, and waits until its own frames say that it has. Raises Refused."""
        try:
            async with asyncio.timeout(self._config.set_role_timeout_s):
                await change
                while entry.is_up and (entry.status is None or not is_done(entry.status)):
                    await self._status_changed.wait()
        except TimeoutError as error:
            raise Refused(Refusal.DEADLINE_EXCEEDED, f"worker {entry.worker_id} did not {what} in time") from error
        except WorkerLost as error:
            raise Refused(Refusal.WORKER_LOST, str(error)) from error
        if not entry.is_up or entry.status is None:
            raise Refused(Refusal.WORKER_LOST, f"worker {entry.worker_id} was lost before it could {what}")
        return entry.status

    # ---- the loop around the core ----

    def _handle(self, event: Event) -> Reject | None:
        """Feeds an event, and those that carrying out its commands brings up. Returns the rejection, if there is one."""
        brought_up: list[Event] = []
        rejection = self._carry_out(self._core.handle(event, self._clock()), brought_up)
        for follower in brought_up:  # which may bring up others
            self._carry_out(self._core.handle(follower, self._clock()), brought_up)
        if not isinstance(event, FrameArrived) or event.frame.status is not None:
            self._status_changed.set()
            self._status_changed.clear()
        return rejection

    def _carry_out(self, commands: list[Command], brought_up: list[Event]) -> Reject | None:
        rejection: Reject | None = None
        for command in commands:
            match command:
                case Deliver(output):
                    stream = self._streams.get(output.request_id)
                    if stream is not None and not stream.push(output):
                        self._give_up(stream, brought_up)
                    elif output.finish_reason is not None:
                        self._streams.pop(output.request_id, None)
                case SendMessage(worker_id, connection, message):
                    link = self._links.get(connection)
                    if link is None or not link.send(message):
                        brought_up.append(WorkerDetached(worker_id, connection, "its send queue is full"))
                case Attach():
                    task = asyncio.create_task(self._read(command), name=f"router-{command.worker_id}")
                    self._readers[command.connection] = task
                    task.add_done_callback(self._closing.discard)
                case Detach(_, connection):
                    self._detach(connection)
                case Reject():
                    rejection = command
                case TellFound(number, found):
                    if (asked := self._sought.get(number)) is not None and not asked.done():
                        asked.set_result(found)
                case JobEnded(job):
                    self.on_job_ended(job)
                case Explain(request_id, decision):
                    if request_id in self._streams:
                        self._streams[request_id].decision = decision
                case _:
                    assert_never(command)
        return rejection

    def _give_up(self, stream: RequestStream, events: list[Event]) -> None:
        """More outputs wait for its reader than may."""
        del self._streams[stream.request_id]
        stream.fail(Refusal.DEADLINE_EXCEEDED, "outputs were read too slowly")
        events.append(RequestCancelled(stream.request_id, "slow_client"))

    def _leave(self, request_id: str) -> None:
        """The reader of a stream went away."""
        if self._streams.pop(request_id, None) is not None:
            self._handle(RequestCancelled(request_id))

    def _detach(self, connection: int) -> None:
        link = self._links.pop(connection, None)
        reader = self._readers.pop(connection, None)
        if reader is not None:
            closing = asyncio.create_task(self._hang_up(link, reader))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _hang_up(self, link: WorkerLink | None, reader: asyncio.Task[None]) -> None:
        """Lets the last messages go first: what is not cancelled runs on at the worker for a while."""
        if link is not None:
            await link.finish()
            await asyncio.wait({reader}, timeout=FINISH_S)
        reader.cancel()
        await asyncio.wait({reader})

    async def _read(self, command: Attach) -> None:
        """Carries one worker's frames in until its stream ends."""
        try:
            link = self._client.attach(WorkerAddress(command.worker_id, 0, command.target), self._router_id)
        except InvalidConfig as error:  # no certificate can carry such an id
            del self._readers[command.connection]
            self._handle(WorkerDetached(command.worker_id, command.connection, str(error)))
            return
        self._links[command.connection] = link
        try:
            async for frame in link.frames():
                self._handle(FrameArrived(command.worker_id, command.connection, frame))
            reason = "closed"
        except WorkerLost as error:
            reason = str(error)
        except Exception:
            logger.exception("a frame of %s could not be handled", command.worker_id)
            reason = "internal error"
        finally:
            self._links.pop(command.connection, None)
            await link.close()
        task = self._readers.pop(command.connection, None)
        if task is not None:
            logger.info("lost the stream of %s: %s", command.worker_id, reason)
            self._handle(WorkerDetached(command.worker_id, command.connection, reason))
