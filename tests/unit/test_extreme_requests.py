"""No request, whatever it asks for within or beyond the bounds of any field, changes a neighbour's tokens, stops them, or ends a process.

A router and a worker with the shipped model. While a victim streams, every extreme of every field of every body is sent; each is cut
off once the victim has gone on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fake_backend import CHECKPOINT
from test_bench_serve import load

from router.api.config import ApiConfig
from router.config import RouterConfig
from router.server import RouterServer
from workers.config import WorkerConfig
from workers.status import Role
from workers.worker import Worker

extremes = load("extreme_requests")

API = ApiConfig(max_body_bytes=4 << 20)
"""The cost of a body grows with its size alone."""
VICTIM = {"prompt": "What is 17 + 25?", "max_tokens": 400, "ignore_eos": True, "skip_special_tokens": False, "seed": 7}
TOKENS_PER_CASE = 8
"""That the victim must get while a case runs."""
TOKENS_UNTIL_CUT_OFF = 60
"""That the victim gets while a case may still be answered."""
ANSWERS = {200, 400, 404, 413, 429}


@asynccontextmanager
async def cluster() -> AsyncIterator[tuple[RouterServer, Worker, httpx.AsyncClient]]:
    worker = Worker(WorkerConfig(str(CHECKPOINT), kv_memory_bytes=64 << 20), "mixed-0", 1, Role.MIXED)
    server = RouterServer(RouterConfig(str(CHECKPOINT), port=0, api=API), "router-0")
    try:
        address = await worker.start()
        url = await server.start()
        server.set_workers((address,))
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=None) as client:
            while (await client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.02)
            yield server, worker, client
    finally:
        await server.stop()
        await worker.stop()


class Victim:
    """Streams the same answer over and over, and compares it with what it was alone."""

    def __init__(self, client: httpx.AsyncClient, golden: str) -> None:
        self._client, self._golden = client, golden
        self.num_tokens = 0
        self._came = asyncio.Condition()

    async def run(self) -> None:
        while True:
            text = ""
            async with self._client.stream("POST", "/v1/completions", json={**VICTIM, "stream": True}) as answer:
                assert answer.status_code == 200
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                        assert self._golden.startswith(text)
                        async with self._came:
                            self.num_tokens += 1
                            self._came.notify_all()
            assert text == self._golden

    async def gets(self, num_tokens: int) -> None:
        wanted = self.num_tokens + num_tokens
        async with self._came:
            await self._came.wait_for(lambda: self.num_tokens >= wanted)


@pytest.mark.timeout(240)
async def test_no_extreme_of_any_field_costs_a_neighbour_its_tokens_or_the_cluster_its_life() -> None:
    async with cluster() as (server, worker, client):
        golden = (await client.post("/v1/completions", json=VICTIM)).json()["choices"][0]["text"]
        victim = Victim(client, golden)
        streaming = asyncio.create_task(victim.run())

        async def attack(case: Any) -> int | None:
            headers = {"content-type": "application/json"}
            request = asyncio.create_task(
                client.post(case.path, content=json.dumps(case.body).encode(), headers=headers)
            )
            for tokens, until in ((TOKENS_PER_CASE, ()), (TOKENS_UNTIL_CUT_OFF, (request,))):
                going_on = asyncio.create_task(victim.gets(tokens))
                await asyncio.wait((going_on, streaming, *until), return_when=asyncio.FIRST_COMPLETED)
                going_on.cancel()
                assert not streaming.done(), f"{case.path} {case.name}: the victim ended: {streaming.exception()!r}"
            request.cancel()
            (answer,) = await asyncio.gather(request, return_exceptions=True)
            return None if isinstance(answer, asyncio.CancelledError) else answer.status_code

        answers: dict[str, int | None] = {}
        for case in extremes.cases(vocab_size=1408, max_model_len=8192, config=API):
            status = answers[f"{case.path} {case.name}"] = await attack(case)
            assert status is None or status in ANSWERS, (case.path, case.name, status)
        assert len(answers) > 120 and {200, 400} <= set(answers.values())
        assert streaming.cancel()
        await asyncio.gather(streaming, return_exceptions=True)
        while any(dict(worker.status().counters)[name] for name in ("held_blocks", "running_transfers")):
            await asyncio.sleep(0.02)
        counters = dict(server.status().counters)
        assert not [name for name in counters if name.startswith(("workers_lost", "failed_"))], counters


def test_every_field_of_every_body_has_its_extreme() -> None:
    """Fails for a field that is new: say in bench/extreme_requests.py what the most is that may be asked of it."""
    found = extremes.Extremes(1408, 8192, API)
    for path, kinds in extremes.BODIES.items():
        for field in extremes.fields_at(path, kinds):
            assert found.of(path, field), (path, field)
