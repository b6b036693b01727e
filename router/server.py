"""Serves the HTTP API of one router from a thread with its own event loop, so that it can live inside any process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any, TypeVar

import uvloop

from router.api.app import create_app
from router.api.middleware import Draining
from router.backend import ListedRouter, LoadingWorker, RouterStatus
from router.config import RouterConfig
from router.driver import RouterDriver
from router.http_server import HttpServer
from router.https import Certificate
from router.listening import bind, bind_unix
from router.roles import RoleDesk
from router.sampling_defaults import load_sampling_defaults
from router.tenants.config import TenantLimits
from router.tenants.desk import TenantDesk
from router.tenants.roster import Key
from router.tenants.tenancy import Tenancy
from router.tenants.usage_log import UsageLog
from workers.errors import Refusal, Refused
from workers.machine.threads import NUM_HELPERS, started_threads
from workers.request import SamplingParams
from workers.status import WorkerAddress
from workers.text.tokenizer import Tokenizer
from workers.trust.credentials import Credentials

T = TypeVar("T")

STATUS_TIMEOUT_S = 5.0
FIRST_WORKER_S = 5.0
LAST_WORDS_S = 5
"""How long a client may take to read the error that ends its stream when the router stops."""


class RouterServer:
    """One router: HTTP in front, workers behind. `set_workers` and `status` may be called from any thread."""

    def __init__(
        self,
        config: RouterConfig,
        router_id: str,
        credentials: Credentials | None = None,
        listener: socket.socket | None = None,
        desk: RoleDesk | None = None,
        tenants: TenantDesk | None = None,
        secret: bytes = b"",
    ) -> None:
        """`tenants` keeps what tenants of several routers share, and `secret` is the cluster's. `desk` carries operators' orders about roles out.
        With `listener`, on which connections may wait already, it serves there, and not on the configured port. There, and on a
        port that others share, it serves once a worker is there, but no later than FIRST_WORKER_S after its start."""
        self._config = config
        self._credentials = credentials
        self._listener = listener
        self._desk = desk
        self._router_id = router_id
        self._tenancy = Tenancy(config.tenants, config.api.api_keys, router_id, secret, tenants)
        self._usage_log: UsageLog | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._driver: RouterDriver | None = None
        self._stop_asked: asyncio.Event | None = None
        self._certificate: Certificate | None = None
        self._serves = asyncio.Event()  # on the router's thread

    async def start(self) -> str:
        """Loads the tokenizer and begins to serve. Returns the URL; raises InvalidConfig when the port is taken, the certificate
        cannot be used, or sampling_defaults name tokens that the model does not have."""
        config = self._config
        self._certificate = Certificate(config.cert_file, config.key_file) if config.cert_file else None
        tokenizer = await asyncio.to_thread(Tokenizer.load, self._config.model)
        await asyncio.to_thread(lambda: tokenizer.control)  # as long to make as the tokenizer
        if self._config.api.sampling_defaults == SamplingParams():
            defaults = load_sampling_defaults(self._config.model)
            self._config = replace(self._config, api=replace(self._config.api, sampling_defaults=defaults))
        self._config.api.check_sampling_defaults(tokenizer.vocab_size)
        usage = self._config.tenants.usage
        self._usage_log = await asyncio.to_thread(UsageLog, usage, self._router_id) if usage.folder else None
        listener = self._listener or bind(self._config.host, self._config.port, self._config.share_port)
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(tokenizer, listener, started), name=f"router-{self._router_id}", daemon=True
        )
        self._thread.start()
        await asyncio.wrap_future(started)
        host, port = listener.getsockname()[:2]
        scheme = "https" if self._certificate else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    async def until_ready(self) -> None:
        """Until it serves and a worker can decode. Raises Refused when the router does not run."""

        async def both(driver: RouterDriver) -> None:
            await driver.wait_ready()
            await self._serves.wait()

        await self.ask(both)

    def set_workers(self, addresses: tuple[WorkerAddress, ...]) -> None:
        """The cluster's members now are these. Takes effect soon after; a stopped router ignores it."""
        loop, driver = self._loop, self._driver
        if loop is not None and driver is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(driver.set_workers, addresses)

    def set_loading(self, loading: tuple[LoadingWorker, ...]) -> None:
        """These workers are on their way. As `set_workers`."""
        loop, driver = self._loop, self._driver
        if loop is not None and driver is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(driver.set_loading, loading)

    def set_routers(self, routers: tuple[ListedRouter, ...]) -> None:
        """The cluster's routers are these. As `set_workers`."""
        loop, driver = self._loop, self._driver
        if loop is not None and driver is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(driver.set_routers, routers)

    def set_tenants(self, tenants: Mapping[str, TenantLimits], keys: Sequence[Key]) -> None:
        """From now on these tenants and keys count, beside those of the configuration."""
        self._tenancy.set_roster(tenants, keys)

    def status(self) -> RouterStatus:
        """Waits for the router's thread, at most STATUS_TIMEOUT_S. Raises Refused when the router does not run, and what went wrong there."""
        loop, driver = self._loop, self._driver
        if loop is None or driver is None:
            raise Refused(Refusal.SHUTTING_DOWN, "the router does not run")
        answer: Future[RouterStatus] = Future()

        def ask() -> None:
            try:
                answer.set_result(driver.status())
            except Exception as error:
                answer.set_exception(error)

        try:
            loop.call_soon_threadsafe(ask)
        except RuntimeError as error:  # its loop is closed
            raise Refused(Refusal.SHUTTING_DOWN, "the router does not answer") from error
        done, _ = wait((answer,), STATUS_TIMEOUT_S)
        if not done:
            raise Refused(Refusal.SHUTTING_DOWN, "the router does not answer")
        return answer.result()

    async def ask(self, question: Callable[[RouterDriver], Coroutine[Any, Any, T]]) -> T:
        """What the coroutine that `question` makes returns, run on the router's thread. Raises Refused when the router does not run."""
        loop, driver = self._loop, self._driver
        if loop is None or driver is None:
            raise Refused(Refusal.SHUTTING_DOWN, "the router does not run")
        asking = question(driver)
        try:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asking, loop))
        except RuntimeError as error:  # its loop is closed
            asking.close()
            raise Refused(Refusal.SHUTTING_DOWN, "the router does not answer") from error

    async def stop(self) -> None:
        """Takes no new requests, lets those that run finish within shutdown_timeout_s, ends the rest with a final error.

        Returns when every connection is closed and the thread has ended.
        """
        loop, thread, asked = self._loop, self._thread, self._stop_asked
        self._loop = self._driver = self._thread = None
        if loop is not None and asked is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(asked.set)
        if thread is not None:
            await asyncio.to_thread(thread.join)

    def _run(self, tokenizer: Tokenizer, listener: socket.socket, started: Future[None]) -> None:
        """The thread."""
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve(tokenizer, listener, started))
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
                return
            raise
        finally:
            listener.close()

    async def _serve(self, tokenizer: Tokenizer, listener: socket.socket, started: Future[None]) -> None:
        asyncio.get_running_loop().set_default_executor(started_threads(NUM_HELPERS, "helper"))
        driver = RouterDriver(self._config, self._router_id, credentials=self._credentials, desk=self._desk)
        await driver.start()
        draining = Draining()
        app = create_app(
            driver,
            tokenizer,
            self._config.api,
            draining,
            self._tenancy,
            self._usage_log,
            self._config.expected_output_tokens,
        )
        unix = bind_unix(self._config.uds) if self._config.uds else None

        def serves() -> None:
            self._serves.set()
            if not started.done():
                started.set_result(None)

        http = HttpServer(
            app,
            self._config.http,
            self._config.keepalive_s,
            serves,
            app.state.metrics.count_refused_connection,
            LAST_WORDS_S,
            self._certificate.context if self._certificate else None,
            unix,
        )
        watching = asyncio.create_task(self._certificate.watch()) if self._certificate else None
        self._stop_asked = asyncio.Event()
        self._loop, self._driver = asyncio.get_running_loop(), driver
        if self._comes_late:
            started.set_result(None)  # its owner tells it of workers from now on
        serving = asyncio.create_task(self._serve_http(http, driver, listener))
        asked = asyncio.create_task(self._stop_asked.wait())
        try:
            await asyncio.wait((serving, asked), return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            draining.begin()
            if self._config.share_port:  # who connects from now on reaches the others
                for server in http.servers:
                    server.close()
            if not serving.done():
                await draining.wait_idle(self._config.shutdown_timeout_s)
            await driver.stop()
            http.should_exit = True
            await serving
            if watching is not None:
                watching.cancel()
            if unix is not None:
                with contextlib.suppress(OSError):
                    os.unlink(self._config.uds)
            await asyncio.to_thread(app.state.access_log.close)
            await self._tenancy.close()
            if self._usage_log is not None:
                await asyncio.to_thread(self._usage_log.close)

    @property
    def _comes_late(self) -> bool:
        return self._listener is not None or self._config.share_port

    async def _serve_http(self, http: HttpServer, driver: RouterDriver, listener: socket.socket) -> None:
        """Those who wait since another router died had workers then, and should not be told that there are none; nor those whom
        the kernel would deal to this router while others that share the port have workers."""
        if self._comes_late:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(driver.wait_ready(), FIRST_WORKER_S)
        await http.serve(sockets=[listener])
