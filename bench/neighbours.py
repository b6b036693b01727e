"""How much one request at the extreme of a field delays another client's tokens, on a cluster that runs.

A victim streams all the time, while each case of bench/extreme_requests.py is sent: printed are the victim's longest gap between two
tokens of an answer meanwhile (gap), its longest wait for a first token where it began an answer (first), and the longest wait of
/health, in milliseconds.

    baton serve &
    python bench/neighbours.py [--url http://127.0.0.1:8000] [--only "stop[2]" "echo[0]"] [--json]

Keys come from BATON_API_KEY and BATON_ADMIN_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import httpx
from extreme_requests import cases

SETTLE_TOKENS = 20
CASE_S = 20.0
"""A case that still runs after this long is cut off: what it does to others is known by then."""


class Victim:
    """A client that streams one answer after the other, and remembers when the last token came."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.num_tokens = 0
        self.longest_s = self.first_s = 0.0
        self._last_s = time.monotonic()

    def begin(self) -> None:
        self.longest_s, self.first_s, self._last_s = 0.0, 0.0, time.monotonic()

    async def run(self) -> None:
        body = {"prompt": "1 2 3", "max_tokens": 8000, "ignore_eos": True, "stream": True, "skip_special_tokens": False}
        while True:
            async with self._client.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                is_first = True
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        at = time.monotonic()
                        if is_first:
                            self.first_s, is_first = max(self.first_s, at - self._last_s), False
                        else:
                            self.longest_s = max(self.longest_s, at - self._last_s)
                        self._last_s = at
                        self.num_tokens += 1
            self._last_s = time.monotonic()

    async def settle(self) -> None:
        wanted = self.num_tokens + SETTLE_TOKENS
        while self.num_tokens < wanted:
            await asyncio.sleep(0.005)


class Health:
    """Asks /health all the time."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.longest_s = 0.0

    async def run(self) -> None:
        while True:
            at = time.monotonic()
            await self._client.get("/health")
            self.longest_s = max(self.longest_s, time.monotonic() - at)
            await asyncio.sleep(0.01)


async def measure(url: str, only: Sequence[str]) -> list[dict[str, Any]]:
    keys = {
        name: {"Authorization": f"Bearer {os.environ[name]}"}
        for name in ("BATON_API_KEY", "BATON_ADMIN_KEY")
        if name in os.environ
    }
    options: dict[str, Any] = {"base_url": url, "timeout": 600.0, "trust_env": False}
    results = []
    async with (
        httpx.AsyncClient(headers=keys.get("BATON_API_KEY"), **options) as client,
        httpx.AsyncClient(headers=keys.get("BATON_ADMIN_KEY"), **options) as admin,
    ):
        card = (await client.get("/v1/models")).json()["data"][0]
        status = (await admin.get("/admin/status")).json()
        vocab_size = status["workers"][0]["status"]["model"]["vocab_size"]
        victim, health = Victim(client), Health(client)
        tasks = [asyncio.create_task(victim.run()), asyncio.create_task(health.run())]
        for case in cases(vocab_size, card["max_model_len"]):
            if not any(name in case.name for name in only):
                continue
            body = await asyncio.to_thread(lambda case=case: json.dumps(case.body).encode())
            await victim.settle()
            victim.begin()
            health.longest_s = 0.0
            begun_s = time.monotonic()
            sender = admin if case.path.startswith("/admin") else client
            answer: Any = "running"
            try:
                async with asyncio.timeout(CASE_S):
                    headers = {"Content-Type": "application/json"}
                    answer = (await sender.post(case.path, content=body, headers=headers)).status_code
            except TimeoutError:
                pass
            except httpx.HTTPError as error:
                answer = type(error).__name__
            took_s = time.monotonic() - begun_s
            await victim.settle()
            row = {
                "path": case.path,
                "case": case.name,
                "answer": answer,
                "took_ms": round(took_s * 1e3),
                "gap_ms": round(victim.longest_s * 1e3),
                "first_ms": round(victim.first_s * 1e3),
                "health_ms": round(health.longest_s * 1e3),
            }
            results.append(row)
            print(
                "  ".join(
                    f"{value!s:>{width}}" for value, width in zip(row.values(), (28, 28, 9, 8, 8, 8, 8), strict=True)
                ),
                flush=True,
            )
            if any(task.done() for task in tasks):
                break
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(ended, asyncio.CancelledError):
                print(f"the victim ended: {ended!r}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose names hold one of these")
    parser.add_argument("--json", action="store_true", help="print the results as JSON in the end")
    args = parser.parse_args()
    print(
        "  ".join(
            f"{name:>{width}}"
            for name, width in (
                ("path", 28),
                ("case", 28),
                ("answer", 9),
                ("took ms", 8),
                ("gap ms", 8),
                ("first ms", 8),
                ("health", 8),
            )
        )
    )
    results = asyncio.run(measure(args.url, args.only))
    for row in sorted(results, key=lambda row: -row["gap_ms"])[:10]:
        print(f"longest: {row['gap_ms']} ms, {row['case']} of {row['path']}")
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
