"""Starts, kills, stops and replaces processes of workers and routers, as a supervisor would; knows no faults and no requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import certificates

from workers.trust import parties

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0
ORDER_TIMEOUT_S = 60.0


class ChildProcess:
    """A process that does what it is told in lines of JSON: `python -m MODULE SPEC`. `name` says who it is."""

    def __init__(self, name: str, module: str, spec: dict[str, Any], on_struck: Callable[[str], None]) -> None:
        self.name = name
        self._module = module
        self._spec = spec
        self._on_struck = on_struck
        self._answers: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._lock = asyncio.Lock()
        self.is_stopped = False
        """SIGSTOP is in force."""

    async def start_child(self) -> dict[str, Any]:
        """Returns what it says first."""
        folders = (str(ROOT), str(ROOT / "tests"))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "CUDA_VISIBLE_DEVICES": ""}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", self._module, json.dumps(self._spec), cwd=ROOT, env=environment,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 20,
        )  # fmt: skip
        self._reader = asyncio.create_task(self._read())
        return await asyncio.wait_for(self._answer(), START_TIMEOUT_S)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    async def order(self, **order: Any) -> dict[str, Any]:
        """Has the child do something. Raises ConnectionError when it has died, TimeoutError when it does not answer."""
        assert self._process.stdin is not None
        if not self.is_alive:
            raise ConnectionError(f"the process of {self.name} ended with {self._process.returncode}")
        # Whoever is cancelled meanwhile must not leave its answer to the next.
        return await asyncio.shield(asyncio.create_task(self._ask(order)))

    async def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        async with self._lock:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            await self._process.stdin.drain()
            return await asyncio.wait_for(self._answer(), ORDER_TIMEOUT_S)

    async def _read(self) -> None:
        """What the child says of itself goes to `on_struck`, the rest are answers."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            said = json.loads(line)
            if "struck" in said:
                self._on_struck(said["struck"])
            else:
                self._answers.put_nowait(said)
        self._answers.put_nowait(None)

    async def _answer(self) -> dict[str, Any]:
        answer = await self._answers.get()
        if answer is None:
            raise ConnectionError(f"the process of {self.name} has ended")
        return answer

    async def kill(self) -> None:
        """SIGKILL, and the end of it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        self._hang_up()

    def stop(self) -> None:
        """SIGSTOP."""
        self.is_stopped = True
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self.is_stopped = False
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGCONT)

    async def end(self) -> dict[str, Any]:
        """Stops what runs there in good order. Returns what they leave behind: empty, or something leaks."""
        left = (await self.order(do="stop"))["left"]
        await asyncio.wait_for(self._process.wait(), ORDER_TIMEOUT_S)
        self._hang_up()
        return left

    def _hang_up(self) -> None:
        """Closes the pipe even if the child has left something in it unread."""
        assert self._process.stdin is not None
        with contextlib.suppress(AttributeError):  # asyncio's, of a pipe that is closed already
            self._process.stdin.transport.abort()


class WorkerProcess(ChildProcess):
    """One child process and the workers in it, (worker_id, role, start_count) each."""

    def __init__(
        self,
        workers: list[tuple[str, str, int]],
        config: dict[str, Any],
        num_blocks: int,
        on_struck: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.workers = workers
        names = [name for name, _, _ in workers]
        for name in ("first", *names):
            certificates.credentials(parties.worker(name))  # before the child looks for its files
        folder = str(certificates.folder())
        spec = {"workers": workers, "config": config, "num_blocks": num_blocks, "certificates": folder}
        super().__init__(str(names), "chaos.child", spec, on_struck)
        self.addresses: dict[str, tuple[int, str]] = {}
        """(generation, host:port) by worker id."""

    async def start(self) -> None:
        said = await self.start_child()
        self.addresses = {name: (generation, target) for name, (generation, target) in said["addresses"].items()}


class RouterProcess(ChildProcess):
    """One router with its HTTP API, on `port`."""

    def __init__(self, router_id: str, port: int, tokenizer: str) -> None:
        self.tokenizer = tokenizer
        certificates.credentials(parties.router(router_id), parties.ADMIN)
        spec = {"router": router_id, "port": port, "tokenizer": tokenizer, "certificates": str(certificates.folder())}
        super().__init__(router_id, "chaos.router_child", spec, lambda _: None)

    async def start(self) -> str:
        """Returns its URL."""
        url: str = (await self.start_child())["url"]
        return url
