"""Run by test_exhausted_workers.py in a process of its own: a worker on a fake model, until its input ends. A line of it sets a limit, as `NOFILE 40`.

Arguments: its id, its transport beside grpc; `nobody`, to run as a user whose processes are counted."""

from __future__ import annotations

import asyncio
import codecs
import logging
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from running_workers import CONFIG, running  # noqa: E402

from workers.machine.threads import NUM_HELPERS, started_threads  # noqa: E402
from workers.status import Role  # noqa: E402

NOBODY = 65534


async def main() -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(started_threads(NUM_HELPERS, "helper"))
    ended = asyncio.Event()

    def read() -> None:
        name, _, most = sys.stdin.readline().partition(" ")
        if not name:
            loop.remove_reader(sys.stdin.fileno())
            ended.set()
            return
        what = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(what, (int(most), resource.getrlimit(what)[1]))
        print("set", flush=True)

    name, transport = sys.argv[1:3]
    config = replace(CONFIG, transports=(transport, "grpc"))
    async with running(name, Role(name.partition("-")[0]), config) as (_, address):
        if "nobody" in sys.argv and os.getuid() == 0:  # root may start what it likes
            codecs.lookup("idna")  # nobody may not read where Python lies
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        print(address.generation, address.target, flush=True)
        loop.add_reader(sys.stdin.fileno(), read)
        await ended.wait()
    print("ended", flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main())
