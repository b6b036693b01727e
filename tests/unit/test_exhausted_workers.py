"""A worker whose host has no descriptor or no thread left for it: what runs goes on, what lacks something is done without it, and all is well afterwards."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from builders import generate_alone, make_request
from running_workers import CONFIG, Attached, running, tokens

from workers.status import Role, WorkerAddress

LONG = make_request(range(5, 205), 200, request_id="long")


class Starved:
    """A worker's process, whose limits can be set, and workers here for the other half of a handoff."""

    def __init__(self, process: subprocess.Popen[str], address: WorkerAddress, transport: str, log: Path) -> None:
        self.process, self.address, self.transport, self.log = process, address, transport, log
        self._number = 0

    @contextmanager
    def limited(self, name: str, most: int) -> Iterator[None]:
        soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        self._set(name, most)
        try:
            yield
        finally:
            self._set(name, soft)

    def _set(self, name: str, most: int) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{name} {most}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "set\n"

    @asynccontextmanager
    async def partner(self) -> AsyncIterator[Partner]:
        """One that has never met the worker there."""
        self._number += 1
        role = Role.PREFILL if self.address.worker_id == "decode-0" else Role.DECODE
        config = replace(CONFIG, transports=(self.transport, "grpc"))
        async with running(f"{role.value}-{self._number}", role, config) as (_, here):
            source, decode = (here, self.address) if role is Role.PREFILL else (self.address, here)
            router = await Attached(decode).start()
            yield Partner(router, source)
            await router.close()


class Partner:
    """A router's stream to who decodes, and who computes prompts."""

    def __init__(self, router: Attached, source: WorkerAddress) -> None:
        self.router, self._source = router, source
        self._number = 0

    async def ask(self) -> str:
        """Has one worker compute a prompt for the other; returns how its KV came."""
        self._number += 1
        asked = make_request(range(4 + self._number, 204), 4, request_id=f"{self._source.worker_id}-{self._number}")
        await self.router.submit(asked, self._source)
        outputs = await self.router.finish(asked.request_id)
        assert tokens(outputs) == generate_alone(asked)
        assert outputs[0].handoff is not None
        return outputs[0].handoff.transport


@pytest.fixture
def starved(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Starved]:
    name, transport, *user = request.param.split()
    program, log = Path(__file__).with_name("worker_starved.py"), tmp_path / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(program), name, transport, *user],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        generation, target = process.stdout.readline().split()
        yield Starved(process, WorkerAddress(name, int(generation), target), transport, log)
        process.stdin.close()
        assert process.stdout.readline() == "ended\n" and process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("starved", ["decode-0 shm", "decode-0 tcp"], indirect=True)
async def test_a_worker_that_may_open_no_more_files_serves_its_routers_and_recovers(starved: Starved) -> None:
    host, port = starved.address.target.rsplit(":", 1)
    async with starved.partner() as partner:
        await partner.router.submit(LONG)
        with ExitStack() as stack:
            stack.enter_context(starved.limited("NOFILE", 8))
            for _ in range(4):
                stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            assert [await partner.ask() for _ in range(2)] == ["local"] * 2, "it computes what it cannot fetch"
        assert tokens(await partner.router.finish("long")) == generate_alone(LONG)
        assert [await partner.ask() for _ in range(2)] == [starved.transport] * 2
    assert "File descriptor limit reached" in (log := starved.log.read_text()) and "Too many open files" in log


@pytest.mark.parametrize("starved", ["decode-0 tcp nobody", "prefill-0 tcp nobody"], indirect=True)
async def test_a_worker_that_may_start_no_more_threads_goes_without_what_needs_them_and_recovers(
    starved: Starved,
) -> None:
    """At either end of a handoff: lanes have threads of their own, and what needs none is taken instead."""
    with starved.limited("NPROC", 1):
        async with starved.partner() as partner:
            assert [await partner.ask() for _ in range(2)] == ["grpc"] * 2
    assert "can't start new thread" in starved.log.read_text()
    async with starved.partner() as partner:  # one that has no reason to avoid tcp for a while
        assert [await partner.ask() for _ in range(2)] == ["tcp"] * 2
    assert "Traceback" not in starved.log.read_text()
