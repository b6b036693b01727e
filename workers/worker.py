"""Puts one worker together: model, engine thread, transfers, gRPC server. Knows no router and no Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

import grpc

from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.engine.thread import EngineThread
from workers.grammar.vocabulary import GrammarVocabulary
from workers.kv_memory.memory import KvMemory
from workers.kv_tiers.opening import open_tiers
from workers.pb import worker_pb2_grpc
from workers.request import Request
from workers.runner import Runner
from workers.scheduler.scheduler import Limits
from workers.serving.driver import RanksView, WorkerDriver
from workers.serving.server import WorkerServer
from workers.status import Identity, ModelInfo, Role, WorkerAddress, WorkerStatus, first_generation
from workers.text.output import Detokenizer
from workers.transports.factory import DataPath, make_data_path
from workers.trust.channels import bind, make_server
from workers.trust.credentials import Credentials
from workers.wire.streams import SERVER

log = logging.getLogger(__name__)

STOP_GRACE_S = 3.0
"""How long a stopping worker waits for its routers to take their last frame."""


class LoadedModel(Protocol):
    """A model ready to run: what an Engine needs beside the bounds."""

    @property
    def runner(self) -> Runner: ...

    @property
    def info(self) -> ModelInfo: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def vocabulary(self) -> GrammarVocabulary | None:
        """None: no grammars can be followed."""
        ...

    def make_detokenizer(self, request: Request) -> Detokenizer: ...


def make_engine(config: WorkerConfig, model: LoadedModel, worker_id: str = "local") -> Engine:
    """An engine with the bounds of `config`. Raises InvalidConfig when its folder for KV blocks cannot be used."""
    limits = Limits(
        config.max_num_seqs,
        config.max_batch_tokens,
        config.max_queue,
        config.local_prefill_tokens,
        config.max_prefill_pause_s,
        config.max_decode_pause_s,
    )
    return Engine(
        model.runner,
        limits,
        make_detokenizer=model.make_detokenizer,
        eos_token_ids=model.eos_token_ids,
        max_model_len=model.info.max_model_len,
        prefix_cache=config.prefix_cache,
        tiers=open_tiers(config, model.runner.kv_memory, model.info.fingerprint, worker_id),
        worker_id=worker_id,
        overlap_steps=config.overlap_steps,
        vocabulary=model.vocabulary,
        request_limits=config.limits,
        keeps_outputs=getattr(model.runner, "decode_agrees", False),
    )


def load_checkpoint(config: WorkerConfig) -> LoadedModel:
    """Loads config.model. Raises InvalidConfig with one sentence when that cannot work."""
    from workers.model.loading import (
        ServedModel,  # torch takes seconds to import; a worker needs it, its callers do not
    )

    return ServedModel.load(config)


class Worker:
    """One worker process. `start_count` counts the starts of this worker id and makes its generation rise.

    `on_role_change(role, generation)` is called on the event loop after each switch. `data_path` makes the KV transports.
    Without `credentials` whoever reaches the port is believed.
    """

    def __init__(
        self,
        config: WorkerConfig,
        worker_id: str,
        start_count: int,
        role: Role,
        on_role_change: Callable[[Role, int], None] | None = None,
        load: Callable[[WorkerConfig], LoadedModel] = load_checkpoint,
        data_path: DataPath = make_data_path,
        clock: Callable[[], float] = time.monotonic,
        credentials: Credentials | None = None,
    ) -> None:
        self._config = config
        self._identity = Identity(worker_id, role, first_generation(start_count))
        self._on_role_change = on_role_change
        self._load = load
        self._make_data_path = data_path
        self._clock = clock
        self._credentials = credentials
        self._driver: WorkerDriver | None = None
        self._grpc: grpc.aio.Server | None = None
        self._thread: EngineThread | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._memory: KvMemory | None = None
        self._engine: Engine | None = None

    async def start(self) -> WorkerAddress:
        """Loads the model, binds the port, starts the engine. Raises InvalidConfig."""
        model = await self._load_model()
        engine = await asyncio.to_thread(make_engine, self._config, model, self._identity.worker_id)
        self._engine = engine
        loop = asyncio.get_running_loop()
        thread = EngineThread(
            engine,
            loop,
            lambda report: driver.on_report(report),
            lambda layers: driver.on_layers(layers),
        )
        memory = model.runner.kv_memory
        self._protect(memory)
        self._grpc = make_server(SERVER, self._credentials)
        transports = self._make_data_path(self._config, memory, self._identity.worker_id, self._grpc, self._credentials)
        driver = WorkerDriver(
            self._config,
            self._identity,
            model.info,
            memory,
            transports,
            thread.post,
            self._clock,
            self._on_role_change,
            self._ranks_view(),
            self._credentials,
        )
        server = WorkerServer(driver, self._identity)
        worker_pb2_grpc.add_WorkerServicer_to_server(server, self._grpc)  # type: ignore[no-untyped-call]
        self._identity.target = self._bind(self._grpc)
        self._driver, self._thread, self._memory = driver, thread, memory
        await self._grpc.start()
        thread.start()
        driver.start()
        self._sweeper = asyncio.create_task(driver.sweep_forever())
        log.info("%s serves %s at %s", self._identity.worker_id, model.info.name, self._identity.target)
        return self._identity.address

    async def _load_model(self) -> LoadedModel:
        return await asyncio.to_thread(self._load, self._config)

    def _protect(self, memory: KvMemory) -> None:
        """Nobody but this process writes into the pool."""
        memory.protect()

    def _ranks_view(self) -> RanksView:
        """What the status says of the worker's ranks."""
        return RanksView()

    def _bind(self, server: grpc.aio.Server) -> str:
        host, port = self._config.host, self._config.port
        return f"{host}:{bind(server, host, port, self._credentials)}"

    def status(self) -> WorkerStatus:
        """Raises RuntimeError before `start`."""
        if self._driver is None:
            raise RuntimeError("the worker has not been started")
        return self._driver.status()

    def set_role(self, role: Role) -> WorkerStatus:
        """As WorkerDriver.set_role."""
        if self._driver is None:
            raise RuntimeError("the worker has not been started")
        return self._driver.set_role(role)

    def set_draining(self, is_draining: bool) -> WorkerStatus:
        """As WorkerDriver.set_draining."""
        if self._driver is None:
            raise RuntimeError("the worker has not been started")
        return self._driver.set_draining(is_draining)

    def watch_draining(self, on_change: Callable[[bool], None]) -> None:
        """From now on `on_change(is_draining)` is called on the event loop when the worker is told to drain, or not to."""
        if self._driver is None:
            raise RuntimeError("the worker has not been started")
        self._driver.on_drain_change = on_change

    async def leave(self) -> bool:
        """Takes no new work and waits until nothing runs here, at most `drain_timeout_s`; False when something still does.

        Nobody is told to remember it: a worker that comes back takes work.
        """
        if self._driver is None:
            return True
        self._driver.set_draining(True, remember=False)
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                await self._driver.wait_idle()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Ends requests and transfers, the server and the engine thread; safe to call twice."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        if self._driver is not None:
            await self._driver.close()
        if self._grpc is not None:
            await self._grpc.stop(grace=STOP_GRACE_S)
            self._grpc = None
        if self._thread is not None:
            await self._thread.stop()
            self._thread = None
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
            self._engine = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None
