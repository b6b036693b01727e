"""What bodies of 16 MiB, which arrive one after the other, do to /health and to another client's stream, on a cluster that runs.

    baton serve &
    python bench/large_bodies.py [--url http://127.0.0.1:8000] [--seconds 20] [--senders 1] [--json]

First nobody sends any, then processes of their own do. Printed are percentiles, in milliseconds, of the gaps between two tokens of the stream
and of the time that /health takes. The key comes from BATON_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx

SIZE = (16 << 20) - 4096
HEALTH_EVERY_S = 0.02
SHARES = (0.5, 0.99, 1.0)


def bodies() -> list[tuple[str, bytes]]:
    """Paths and bodies: a text and token ids far beyond any context, many messages, and a field that is read and dropped."""
    said = [{"role": "user", "content": "x" * 1900}] * 8192
    return [
        (
            "/v1/chat/completions",
            json.dumps({"messages": [{"role": "user", "content": "x y " * (SIZE // 4)}]}).encode(),
        ),
        ("/v1/completions", json.dumps({"prompt": "7" * SIZE}).encode()),
        ("/v1/completions", b'{"prompt": [' + b"5," * (SIZE // 2 - 10) + b"5]}"),
        ("/tokenize", json.dumps({"messages": said}).encode()),
        ("/v1/chat/completions", json.dumps({"messages": said[:1], "max_tokens": 2, "user": "x" * SIZE}).encode()),
    ]


def client(url: str) -> httpx.AsyncClient:
    key = os.environ.get("BATON_API_KEY")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    return httpx.AsyncClient(base_url=url, timeout=120.0, trust_env=False, headers=headers)


async def send(url: str) -> None:
    """Until it is ended; says after each body what came."""
    async with client(url) as http:
        for path, body in itertools.cycle(bodies()):
            try:
                print((await http.post(path, content=body)).status_code, flush=True)
            except httpx.HTTPError as error:
                print(type(error).__name__, flush=True)


async def watch_health(http: httpx.AsyncClient, took_s: list[float]) -> None:
    while True:
        begun_s = time.monotonic()
        (await http.get("/health")).raise_for_status()
        took_s.append(time.monotonic() - begun_s)
        await asyncio.sleep(HEALTH_EVERY_S)


async def watch_stream(http: httpx.AsyncClient, gaps_s: list[float]) -> None:
    body = {"prompt": "1 2 3", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    while True:
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            last_s = 0.0
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    now_s = time.monotonic()
                    if last_s:
                        gaps_s.append(now_s - last_s)
                    last_s = now_s


async def measure(url: str, seconds: float) -> dict[str, Any]:
    health_s: list[float] = []
    gaps_s: list[float] = []
    async with client(url) as http, client(url) as other:
        tasks = [asyncio.create_task(watch_health(http, health_s)), asyncio.create_task(watch_stream(other, gaps_s))]
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
    return {"health_ms": percentiles(health_s), "gap_ms": percentiles(gaps_s), "num_tokens": len(gaps_s)}


def percentiles(times_s: Sequence[float]) -> list[float]:
    """Of SHARES, in milliseconds."""
    ordered = sorted(times_s)
    return [round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3, 1) for share in SHARES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--senders", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--send", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.send:
        asyncio.run(send(args.url))
        return
    rows = {"without": asyncio.run(measure(args.url, args.seconds))}
    command = [sys.executable, __file__, "--url", args.url, "--send"]
    senders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(args.senders)]
    try:
        for sender in senders:  # its bodies are made
            assert sender.stdout is not None and sender.stdout.readline()
        rows["with"] = asyncio.run(measure(args.url, args.seconds))
    finally:
        for sender in senders:
            sender.terminate()
        answers = "".join(sender.communicate()[0] for sender in senders).split()
    rows["with"]["answers"] = {kind: answers.count(kind) for kind in sorted(set(answers))}
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'':10}{'/health p50':>12}{'p99':>8}{'max':>8}{'gap p50':>10}{'p99':>8}{'max':>8}   ms")
    for name, row in rows.items():
        health, gap = row["health_ms"], row["gap_ms"]
        print(f"{name:10}{health[0]:12}{health[1]:8}{health[2]:8}{gap[0]:10}{gap[1]:8}{gap[2]:8}")
    print(f"bodies: {rows['with']['answers']}")


if __name__ == "__main__":
    main()
