"""What a command that keeps workers says of them: everything that becomes of them from the moment on that it says they are up."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace

from cluster.commands.running import tell_changes
from cluster.console.output import StepPrinter
from cluster.membership.membership import Registration
from cluster.store.memory import MemoryStore
from workers.status import Role, WorkerAddress

DECODE = Registration(WorkerAddress("decode-0", 1 << 32, "127.0.0.1:1"), Role.DECODE)
AGAIN = replace(DECODE, address=replace(DECODE.address, generation=2 << 32))


async def test_a_worker_that_is_started_again_as_soon_as_all_is_up_is_told_of() -> None:
    store, said, told, doing = MemoryStore(), io.StringIO(), list[frozenset[str]](), list[asyncio.Task[int]]()
    await store.put(DECODE.key, DECODE.encode())

    def announce() -> None:
        assert told == [{"decode-0"}], "who waits for the announcement finds it ready"
        doing.append(asyncio.ensure_future(store.put(AGAIN.key, AGAIN.encode())))

    telling = asyncio.ensure_future(tell_changes(store, 60.0, StepPrinter(said), announce, on_members=told.append))
    async with asyncio.timeout(30):
        while "decode-0 was started again: decode, generation " not in said.getvalue():
            await asyncio.sleep(0)
    telling.cancel()
    await asyncio.gather(telling, *doing, return_exceptions=True)
