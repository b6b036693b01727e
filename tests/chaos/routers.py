"""Several routers under fire: clients that resume, routers that are killed under them beside workers, and what is left at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from builders import make_request
from byte_tokens import write_tokenizer

from chaos.arena import PATIENCE_S
from chaos.census import children, shared_memory_names
from chaos.faults import CLIENT_STEPS, Fault, Kind, Step, draw_plan
from chaos.processes import RouterProcess, WorkerProcess
from chaos.run import Outcome, Recovery, Result
from router.resume import ResumingClient
from workers.request import Request

KINDS = (Kind.KILL_ROUTER, Kind.KILL_DECODE)
GIVE_UP_S = 120.0
"""Of a client: processes take their time to start."""


def draw_requests(seed: int, count: int) -> list[Request]:
    dice = random.Random(f"routers/{seed}")
    return [
        make_request(
            [dice.randrange(10, 1000) for _ in range(dice.randint(20, 300))],
            dice.choice((30, 120, 400)),
            request_id=f"routers-{index}",
            temperature=dice.choice((0.0, 1.0)),
            seed=dice.randrange(1 << 30),
            ignore_eos=True,
        )
        for index in range(count)
    ]


def draw_router_plan(seed: int, count: int, kinds: tuple[Kind, ...]) -> list[Fault | None]:
    """Without a kind that can strike here: no faults."""
    kinds = tuple(kind for kind in KINDS if kind in kinds)
    if not kinds:
        return [None] * count
    plan = draw_plan(seed, "routers", 40 * count, kinds)
    found = [fault for fault in plan if fault is None or fault.step in CLIENT_STEPS]
    random.Random(f"routers/{seed}").shuffle(found)
    return found[:count]


class RouterRun:
    """As ChaosRun, over HTTP; `golden(request)` gives (tokens, text), of which tokens are compared."""

    def __init__(
        self,
        config: dict[str, Any],
        requests: list[Request],
        plan: list[Fault | None],
        golden: Callable[[Request], tuple[list[int], str]],
        concurrency: int,
        num_routers: int = 3,
        num_workers: int = 2,
    ) -> None:
        self.requests = requests
        self.plan = plan
        self._golden = golden
        self._gate = asyncio.Semaphore(concurrency)
        self._config = config | {"orphan_grace_s": 10.0}
        self._names = [f"mixed-{number}" for number in range(num_workers)]
        self._num_routers = num_routers
        self._starts = dict.fromkeys(self._names, 0)
        self._workers: dict[str, WorkerProcess] = {}
        self._routers: dict[str, RouterProcess] = {}
        """By URL."""
        self._busy: set[str] = set()
        """Names and URLs of what is being started again."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaks: list[str] = []
        self._num_killed = 0
        self._struck: set[str] = set()

    async def run(self) -> Result:
        self._loop = asyncio.get_running_loop()
        result, began = Result("routers"), time.monotonic()
        before = shared_memory_names(), children(os.getpid())
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder))
            try:
                await asyncio.gather(*(self._start_worker(name) for name in self._names))
                await asyncio.gather(*(self._start_router(number, folder) for number in range(self._num_routers)))
                pairs = zip(self.requests, self.plan, strict=True)
                result.outcomes = await asyncio.gather(*(self._one(request, fault) for request, fault in pairs))
            finally:
                await self._close()
        left = sorted(shared_memory_names() - before[0]), sorted(children(os.getpid()) - before[1])
        self._leaks += [f"after the run there are {left}"] if any(left) else []
        result.leaks, result.num_killed, result.seconds = self._leaks, self._num_killed, time.monotonic() - began
        return result

    # ---- processes ----

    async def _start_worker(self, name: str) -> None:
        self._starts[name] += 1
        process = WorkerProcess([(name, "mixed", self._starts[name])], self._config, 256)
        await process.start()
        self._workers[name] = process
        await self._announce()

    async def _start_router(self, number: int, folder: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        process = RouterProcess(f"router-{number}", port, folder)
        self._routers[await process.start()] = process
        await self._announce()

    async def _announce(self) -> None:
        """Tells the routers that are there who is a member."""
        found = [(name, *process.addresses[name]) for name, process in self._workers.items()]
        for url, router in list(self._routers.items()):
            if url not in self._busy:
                with contextlib.suppress(ConnectionError):  # killed meanwhile: told when it is back
                    await router.order(do="workers", workers=found)

    async def _kill_router(self, url: str) -> bool:
        if url in self._busy:
            return False
        self._busy.add(url)
        self._num_killed += 1
        old = self._routers[url]
        await old.kill()
        again = RouterProcess(old.name, int(url.rpartition(":")[2]), old.tokenizer)
        self._spawn(self._replace(url, again))
        return True

    async def _replace(self, url: str, again: RouterProcess) -> None:
        await again.start()
        self._routers[url] = again
        self._busy.discard(url)
        await self._announce()

    async def _kill_worker(self, chance: float) -> bool:
        """The last one that is there is left alone: nobody could go on meanwhile."""
        there = [name for name in self._names if name not in self._busy]
        if len(there) < 2:
            return False
        name = there[int(chance * len(there))]
        self._busy.add(name)
        self._num_killed += 1
        await self._workers[name].kill()
        self._spawn(self._replace_worker(name))
        return True

    async def _replace_worker(self, name: str) -> None:
        await self._start_worker(name)
        self._busy.discard(name)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._leaks.append(f"a process could not be started again: {error!r}")

    # ---- clients ----

    async def _one(self, request: Request, fault: Fault | None) -> Outcome:
        async with self._gate:
            began = time.monotonic()
            tokens, num_resumed, trouble = await asyncio.to_thread(self._follow, request, fault)
            seconds = time.monotonic() - began
        golden, _ = await asyncio.to_thread(self._golden, request)
        if not trouble and tokens != golden:
            trouble = f"other tokens than the golden run's ({len(tokens)} of {len(golden)})"
        recovery = Recovery.RESUMED if num_resumed else Recovery.UNHARMED
        name = request.request_id
        return Outcome(name, fault, name in self._struck, recovery, trouble, seconds)

    def _follow(self, request: Request, fault: Fault | None) -> tuple[list[int], int, str]:
        """In a thread: the tokens, how often the stream was resumed, and what is wrong."""
        params, tokens = request.params, list[int]()
        body = {
            "model": "fake", "prompt": list(request.prompt_token_ids), "max_tokens": params.max_tokens, "seed": params.seed,
            "temperature": params.temperature, "ignore_eos": True, "return_token_ids": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        urls = list(self._routers)
        random.Random(request.request_id).shuffle(urls)
        when = {
            Step.SUBMIT: 0,
            Step.FIRST_TOKEN: 1,
            Step.MIDDLE_TOKEN: params.max_tokens // 2,
            Step.LAST_TOKEN: params.max_tokens - 1,
        }
        at, usage = (when[fault.step] if fault is not None else -1), None
        with ResumingClient(urls, give_up_s=GIVE_UP_S) as client:
            try:
                if fault is not None and at == 0:
                    self._strike(fault, client.url, request.request_id)
                for event in client.stream("/v1/completions", body):
                    before = len(tokens)
                    for choice in event["choices"]:
                        tokens += choice["token_ids"]
                    usage = event["usage"] or usage
                    if fault is not None and before < at <= len(tokens):
                        self._strike(fault, client.url, request.request_id)
            except Exception as error:
                return tokens, client.num_resumed, repr(error)
            is_counted = usage is not None and usage["completion_tokens"] == len(tokens)
            return tokens, client.num_resumed, "" if is_counted else f"usage says {usage}"

    def _strike(self, fault: Fault, url: str, name: str) -> None:
        work = self._kill_router(url) if fault.kind is Kind.KILL_ROUTER else self._kill_worker(fault.chance)
        if asyncio.run_coroutine_threadsafe(work, self._loop).result():
            self._struck.add(name)

    # ---- the end ----

    async def _close(self) -> None:
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        deadline = time.monotonic() + PATIENCE_S
        while (held := await self._held()) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        self._leaks += held
        for process in (*self._routers.values(), *self._workers.values()):
            try:
                left = await process.end()
                self._leaks += [f"{process.name} left behind {left}"] if left else []
            except Exception as error:
                self._leaks.append(f"{process.name} did not stop: {error!r}")
                await process.kill()

    async def _held(self) -> list[str]:
        """What is not free though nobody waits for anything."""
        held = []
        for router in self._routers.values():
            census = await router.order(do="census")
            if census["running"] or census["waiting"] or census["workers"] < len(self._names):
                held.append(f"{router.name} has {census}")
        for worker in self._workers.values():
            for name, counters in (await worker.order(do="census"))["workers"].items():
                busy = {k: v for k, v in counters.items() if k in ("held_blocks", "running_transfers") and v}
                held += [f"{name} still holds {busy}"] if busy else []
        return held
