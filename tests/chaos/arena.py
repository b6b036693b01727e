"""A cluster under fire: worker processes behind their middles, a router, and what a supervisor does. Counts what is left at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import certificates

from chaos.census import children, descriptors, shared_memory_names, sockets, too_many
from chaos.middle import Hand, Middle
from chaos.processes import WorkerProcess
from router.config import RouterConfig
from router.driver import RouterDriver
from workers.errors import InvalidRequest, Refused
from workers.status import Role, WorkerAddress
from workers.trust import parties

PATIENCE_S = 30.0
"""How long a quiet cluster may take to let go of everything."""


PATIENT: dict[str, Any] = {"max_attempts": 100, "max_lost_workers": 100, "recovery_timeout_s": 120.0}
"""Bounds of the router above their defaults: here a request may be set back by its neighbours' faults again and again."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a cluster is and what its workers are like. `together`: workers i of both roles share a process."""

    num_prefill: int
    num_decode: int
    config: dict[str, Any]
    num_blocks: int = 64
    together: bool = False
    decode_room_bytes: int = 0
    """How much more memory a decode worker may map once it runs; 0: no limit."""

    def posts(self) -> list[list[tuple[str, str]]]:
        """The (worker id, role) pairs of each process."""
        prefill = [(f"prefill-{i}", "prefill") for i in range(self.num_prefill)]
        decode = [(f"decode-{i}", "decode") for i in range(self.num_decode)]
        if not self.together:
            return [[one] for one in (*prefill, *decode)]
        return [list(pair) for pair in zip(prefill, decode, strict=True)]


class Arena:
    """Call `open`, use `driver`, hurt workers, `close`. What is wrong at the end is in `leaks`."""

    def __init__(
        self, shape: Shape, hand: Hand, on_struck: Callable[[str], None] = lambda _: None, stale_s: float = 3.0
    ) -> None:
        self._shape = shape
        self._on_struck = on_struck
        self.stale_s = stale_s
        # Faults of handoffs want handoffs: no decode worker is to compute prompts because it is idle.
        bounds: dict[str, Any] = {"worker_stale_s": stale_s, "max_local_prefill_tokens": 0}
        config = RouterConfig(model="unused", tick_s=0.05, **bounds, **PATIENT)
        names = [name for post in shape.posts() for name, _ in post]
        router = parties.router("chaos")
        self.driver = RouterDriver(config, "chaos", credentials=certificates.credentials(router, parties.ADMIN))
        # Who stands in the middle is everybody to everybody.
        everybody = (parties.OBSERVER, parties.ADMIN, router, *map(parties.worker, names))
        self._middles = {name: Middle(name, hand, certificates.credentials(*everybody)) for name in names}
        self._processes: dict[str, WorkerProcess] = {}
        self._zombies: list[WorkerProcess] = []
        self._starts: dict[str, int] = {}
        self._busy: set[str] = set()
        """Workers to whom something is being done."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.leaks: list[str] = []
        self.num_killed = self.num_stopped = self.num_switched = self.num_drained = self.num_moved = 0

    async def open(self) -> None:
        self._sockets = sockets()
        self._before = descriptors(), shared_memory_names(), children(os.getpid())
        for middle in self._middles.values():
            await middle.start()
        await asyncio.gather(*(self._start(post) for post in self._shape.posts()))
        await self.driver.start()
        self._announce()
        await self._until(lambda: sum(w.connected for w in self.driver.status().workers) == len(self._middles))

    async def _start(self, post: list[tuple[str, str]]) -> None:
        for name, _ in post:
            self._starts[name] = self._starts.get(name, 0) + 1
        workers = [(name, role, self._starts[name]) for name, role in post]
        process = WorkerProcess(workers, self._shape.config, self._shape.num_blocks, self._on_struck)
        await process.start()
        if self._shape.decode_room_bytes and any(role == "decode" for _, role in post):
            await process.order(do="limit", room_bytes=self._shape.decode_room_bytes)
        for name, _ in post:
            self._processes[name] = process
            host, port = process.addresses[name][1].rsplit(":", 1)
            self._middles[name].target = (host, int(port))

    def _announce(self) -> None:
        """Tells the router who is a member, as the cluster's store would."""
        self.driver.set_workers(
            WorkerAddress(name, self._processes[name].addresses[name][0], middle.address)
            for name, middle in self._middles.items()
        )

    def _post_of(self, worker_id: str) -> list[tuple[str, str]]:
        return next(post for post in self._shape.posts() if any(name == worker_id for name, _ in post))

    def process(self, worker_id: str) -> WorkerProcess:
        return self._processes[worker_id]

    # ---- what can be done to workers; each returns False when the worker is in the middle of something else ----

    async def kill(self, worker_id: str) -> bool:
        """SIGKILL; a successor with the next start count is started in the background."""
        post = self._post_of(worker_id)
        if not self._take(post):
            return False
        self.num_killed += 1
        for name, _ in post:
            self._middles[name].target = None
        await self._processes[worker_id].kill()
        self._spawn(self._replace(post))
        return True

    def stop(self, worker_id: str, duration_s: float) -> bool:
        """SIGSTOP for a while."""
        post = self._post_of(worker_id)
        if not self._take(post):
            return False
        self.num_stopped += 1
        self._processes[worker_id].stop()
        self._spawn(self._go_on(post, duration_s))
        return True

    def replace_hung(self, worker_id: str, duration_s: float) -> bool:
        """SIGSTOP, a successor under the same name, SIGCONT: two processes think that they are this worker."""
        post = self._post_of(worker_id)
        if not self._take(post):
            return False
        self.num_stopped += 1
        zombie = self._processes[worker_id]
        zombie.stop()
        self._spawn(self._succeed(post, zombie, duration_s))
        return True

    async def switch(self, worker_id: str, duration_s: float) -> bool:
        """The other role for a while: two new generations."""
        post = self._post_of(worker_id)
        if not self._take(post):
            return False
        self.num_switched += 1
        role = Role(next(role for name, role in post if name == worker_id))
        other = Role.DECODE if role is Role.PREFILL else Role.PREFILL
        await self._set_role(worker_id, other)
        self._spawn(self._switch_back(post, worker_id, role, duration_s))
        return True

    async def drain(self, worker_id: str, duration_s: float) -> bool:
        """Has all that runs on a decode worker move elsewhere, and lets it take work again after a while."""
        post = self._post_of(worker_id)
        if not self._take(post):
            return False
        self.num_drained += 1
        with contextlib.suppress(Refused, InvalidRequest):  # it is being lost at this moment
            await self.driver.set_draining(worker_id, True, force=True)
        self._spawn(self._undrain(post, worker_id, duration_s))
        return True

    def _take(self, post: list[tuple[str, str]]) -> bool:
        names = {name for name, _ in post}
        if names & self._busy:
            return False
        self._busy |= names
        return True

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace(self, post: list[tuple[str, str]]) -> None:
        try:
            await self._start(post)
            self._announce()
        except Exception as error:
            self.leaks.append(f"{post} could not be started again: {error!r}")
        finally:
            self._busy -= {name for name, _ in post}

    async def _go_on(self, post: list[tuple[str, str]], duration_s: float) -> None:
        process = self._processes[post[0][0]]
        try:
            await asyncio.sleep(duration_s)
        finally:
            process.go_on()
            self._busy -= {name for name, _ in post}

    async def _succeed(self, post: list[tuple[str, str]], zombie: WorkerProcess, duration_s: float) -> None:
        self._zombies.append(zombie)
        try:
            await self._start(post)
            self._announce()
            await asyncio.sleep(duration_s)
        except Exception as error:
            self.leaks.append(f"{post} could not be succeeded: {error!r}")
        finally:
            zombie.go_on()
            self._busy -= {name for name, _ in post}

    async def _set_role(self, worker_id: str, role: Role) -> None:
        with contextlib.suppress(Refused, InvalidRequest):  # it is being lost at this moment
            await self.driver.set_role(worker_id, role, force=True)

    async def _switch_back(self, post: list[tuple[str, str]], worker_id: str, role: Role, duration_s: float) -> None:
        try:
            await asyncio.sleep(duration_s)
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline:
                await self._set_role(worker_id, role)
                status = [w.status for w in self.driver.status().workers if w.status.worker_id == worker_id]
                if status and status[0].role is role:
                    return
                await asyncio.sleep(0.05)
            self.leaks.append(f"{worker_id} did not become {role} again")
        finally:
            self._busy -= {name for name, _ in post}

    async def _undrain(self, post: list[tuple[str, str]], worker_id: str, duration_s: float) -> None:
        try:
            await asyncio.sleep(duration_s)
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline:
                with contextlib.suppress(Refused, InvalidRequest):
                    await self.driver.set_draining(worker_id, False, force=True)
                status = [w.status for w in self.driver.status().workers if w.status.worker_id == worker_id]
                if status and not status[0].is_draining:
                    return
                await asyncio.sleep(0.05)
            self.leaks.append(f"{worker_id} did not take work again")
        finally:
            self._busy -= {name for name, _ in post}

    # ---- the end ----

    async def close(self) -> None:
        """Waits until nothing runs, counts what is held, stops everything, and counts again."""
        try:
            while self._tasks:
                await asyncio.wait(set(self._tasks))
            await self._settle()
        except Exception as error:
            self.leaks.append(f"the cluster did not settle: {error!r}")
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            status = self.driver.status()
            if status.num_running or status.num_waiting:
                self.leaks.append(f"the router has {status.num_running} running, {status.num_waiting} waiting requests")
            self.num_moved = int(dict(status.counters).get("migrations_done", 0))
            await self.driver.stop()
            await asyncio.gather(*(self._end(process) for process in {*self._processes.values(), *self._zombies}))
            for middle in self._middles.values():
                await middle.close()
            await self._check_self()

    async def _settle(self) -> None:
        """Every worker, hung ones that came back too, holds no block, no transfer and no pool of a dead process."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            held = await self._held()
            if not held:
                return
            if time.monotonic() > deadline:
                self.leaks += held
                return
            await asyncio.sleep(0.2)

    async def _held(self) -> list[str]:
        processes = {*self._processes.values(), *self._zombies}
        counts = {process: await process.order(do="census") for process in processes}
        alive = {inode for count in counts.values() for inode in count["own_pools"]}
        held: list[str] = []
        for process, count in counts.items():
            for name, counters in count["workers"].items():
                busy = {k: v for k, v in counters.items() if k in ("held_blocks", "running_transfers") and v}
                if busy:
                    held.append(f"{name} (pid {process.pid}) still holds {busy}")
            dead = set(count["mapped_pools"]) - alive
            if dead:
                held.append(f"{[name for name, _, _ in process.workers]} map {len(dead)} pools of dead processes")
            if len(count["own_pools"]) != len(process.workers):
                held.append(f"{[name for name, _, _ in process.workers]} own {len(count['own_pools'])} pools")
        return held

    async def _end(self, process: WorkerProcess) -> None:
        names = [name for name, _, _ in process.workers]
        try:
            left = await process.end()
            if left:
                self.leaks.append(f"{names} left behind {left}")
        except Exception as error:
            self.leaks.append(f"{names} did not stop: {error!r}")
            process.go_on()
            await process.kill()

    async def _check_self(self) -> None:
        """The router and everything else in this process."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            left: dict[str, Any] = {
                "descriptors": too_many(descriptors(), self._before[0]),
                "shared memory": sorted(shared_memory_names() - self._before[1]),
                "children": sorted(children(os.getpid()) - self._before[2]),
            }
            if not any(left.values()):
                return
            if time.monotonic() > deadline:
                self.leaks.append(f"after the run this process has {left}: {sorted(sockets() - self._sockets)}")
                return
            await asyncio.sleep(0.1)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.02)
