"""A process with one or more real workers in it, told by lines of JSON on its standard input what to do; answers on standard output.

Its end of standard input is its life line: when the harness dies, so does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from builders import FakeModel

from chaos.census import descriptors, mapped_pools, own_pools, python_threads, too_many
from chaos.faults import Kind
from chaos.faulty_transport import DataFault, FaultBook, faulty_data_path
from cluster.identity.folder import config_of
from workers.config import WorkerConfig
from workers.engine.fake_runner import FakeRunner
from workers.errors import TransferFailed
from workers.runner import Batch, Sampled
from workers.status import Role
from workers.trust import parties
from workers.trust.credentials import Credentials
from workers.worker import LoadedModel, Worker, load_checkpoint

PATIENCE_S = 20.0
"""How long gRPC and the kernel may take to close what was told to close."""


def fail_a_pair() -> None:
    """A Gloo pair whose other end never comes: the first one leaves libtorch with a pipe for good, later ones add none."""
    from workers.transports.pair_group import RECEIVER, GlooPair, host_store, reach_store

    host = "127.0.0.1"
    store = host_store(host, 1.0)
    with contextlib.suppress(TransferFailed):
        GlooPair(reach_store(host, store.port, 1.0), "nobody", RECEIVER, host, 0.1)


class PacedRunner(FakeRunner):
    """A FakeRunner that takes its time, so that a transfer has a middle."""

    step_s = 0.002

    def execute(self, batch: Batch) -> list[Sampled]:
        time.sleep(self.step_s)
        return super().execute(batch)


class PacedModel(FakeModel):
    def __init__(self, config: WorkerConfig, num_blocks: int) -> None:
        super().__init__(config, num_blocks)
        self.runner = PacedRunner(self.runner.kv_memory, self.runner.vocab_size)


class Child:
    """The workers of this process. `spec` has config, num_blocks and workers: [(worker_id, role, start_count)]."""

    def __init__(self, spec: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
        self._book = FaultBook(lambda transfer_id: say({"struck": transfer_id}))
        self._config = WorkerConfig(**{**spec["config"], "transports": tuple(spec["config"]["transports"])})
        self._spec = spec
        self._workers: dict[str, Worker] = {}
        self._before: tuple[Counter[str], Counter[str]] = (Counter(), Counter())

    def _load(self, config: WorkerConfig) -> LoadedModel:
        return PacedModel(config, self._spec["num_blocks"]) if config.model == "fake" else load_checkpoint(config)

    def _credentials(self, worker_id: str) -> Credentials:
        return Credentials(config_of(Path(self._spec["certificates"])), parties.worker(worker_id))

    async def start(self) -> dict[str, Any]:
        """Starts everything, after one worker that only makes what a process makes once."""
        await self._start_and_stop()
        gc.collect()
        self._before = descriptors(), python_threads()
        addresses = {}
        for worker_id, role, start_count in self._spec["workers"]:
            data_path = faulty_data_path(self._book)
            worker = Worker(
                self._config,
                worker_id,
                start_count,
                Role(role),
                load=self._load,
                data_path=data_path,
                credentials=self._credentials(worker_id),
            )
            self._workers[worker_id] = worker
            address = await worker.start()
            addresses[worker_id] = [address.generation, address.target]
        return {"addresses": addresses, "pid": os.getpid()}

    async def _start_and_stop(self) -> None:
        worker = Worker(self._config, "first", 1, Role.MIXED, load=self._load, credentials=self._credentials("first"))
        await worker.start()
        await worker.stop()
        if "gloo" in self._config.transports:
            await asyncio.to_thread(fail_a_pair)

    async def handle(self, order: dict[str, Any]) -> dict[str, Any]:
        match order["do"]:
            case "arm":
                self._book.arm(order["transfer"], DataFault(Kind(order["kind"]), order["piece"], order["delay_s"]))
                return {}
            case "census":
                return self._census()
            case "limit":
                return self._limit_memory(order["room_bytes"])
            case "stop":
                return await self._stop()
        raise ValueError(order)

    def _census(self) -> dict[str, Any]:
        gc.collect()  # the worker that came first is a cycle, and its mapping goes with it
        return {
            "workers": {name: dict(worker.status().counters) for name, worker in self._workers.items()},
            "own_pools": sorted(own_pools()),
            "mapped_pools": sorted(mapped_pools()),
            "descriptors": sum(descriptors().values()),
            "threads": len(os.listdir("/proc/self/task")),
            "tasks": len(asyncio.all_tasks()),
        }

    def _limit_memory(self, room_bytes: int) -> dict[str, Any]:
        """From now on the process can map at most so many bytes more."""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + room_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        return {"limit_bytes": limit}

    async def _stop(self) -> dict[str, Any]:
        """Stops the workers and says what is left of them."""
        while self._workers:
            await self._workers.popitem()[1].stop()
        deadline = time.monotonic() + PATIENCE_S
        while True:
            gc.collect()
            left = {
                "descriptors": too_many(descriptors(), self._before[0]),
                # asyncio's own helper threads stay until the loop closes.
                "threads": {k: v for k, v in too_many(python_threads(), self._before[1]).items() if k != "asyncio"},
                "pools": sorted(mapped_pools()),
                "tasks": [place(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()],
            }
            left["tasks"] = [name for name in left["tasks"] if "serve_orders" not in name]
            if not any(left.values()) or time.monotonic() > deadline:
                return {"left": {k: v for k, v in left.items() if v}}
            await asyncio.sleep(0.05)


def place(task: asyncio.Task[Any]) -> str:
    """The coroutine of a task and those that it waits in, down to the innermost."""
    names, inner = [], task.get_coro()
    while inner is not None and len(names) < 20:
        names.append(getattr(inner, "__qualname__", repr(inner)))
        inner = getattr(inner, "cr_await", None)
    return " > ".join(names)


class Obedient(Protocol):
    async def start(self) -> dict[str, Any]: ...

    async def handle(self, order: dict[str, Any]) -> dict[str, Any]: ...


async def serve_orders(make: Callable[[Callable[[dict[str, Any]], None]], Obedient]) -> None:
    """Until it is told to stop, or nobody is there any more. `make(say)`: what obeys."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    def say(answer: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

    child = make(say)
    say(await child.start())
    while line := await reader.readline():
        order = json.loads(line)
        say(await child.handle(order))
        if order["do"] == "stop":
            return


if __name__ == "__main__":
    logging.basicConfig(
        level=os.environ.get("CHAOS_LOG", "ERROR"), format="%(process)d %(asctime)s %(name)s %(message)s"
    )
    logging.getLogger("grpc._common").setLevel(
        logging.CRITICAL
    )  # it shows each message that cannot be read, with a traceback
    asyncio.run(serve_orders(lambda say: Child(json.loads(sys.argv[1]), say)))
