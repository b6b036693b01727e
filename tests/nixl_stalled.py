"""A NIXL receiver over UCX's tcp whose sender is stopped in mid-read and goes on later; run as a program, since UCX reads its settings once."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import transport_ends
from transport_ends import LAYOUT, TIMEOUT_S, End, whole_blocks

from workers.status import WorkerAddress
from workers.transports.nixl import NUM_SLOTS, NixlTransport

BOUND_S = 3 * TIMEOUT_S


async def stop(child: asyncio.subprocess.Process) -> None:
    """Returns when every thread of it stands still: a signal takes its time, and the sender would go on meanwhile."""
    child.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{child.pid}/task")
    async with asyncio.timeout(BOUND_S):
        while any((task / "stat").read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.iterdir()):
            await asyncio.sleep(0.001)


async def main() -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable, transport_ends.__file__, "nixl", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdin is not None and child.stdout is not None
    target = await End.start("nixl", "decode-0")
    transport = target.transport
    assert isinstance(transport, NixlTransport)
    try:
        source = WorkerAddress("prefill-0", 1, json.loads(await child.stdout.readline())["target"])
        child.stdin.write(json.dumps({"do": "offer", "to": ["decode-0", 1, ""]}).encode() + b"\n")
        offer = base64.b64decode(json.loads(await child.stdout.readline())["offer"])
        channel = await transport.connect(source, LAYOUT, offer)
        pieces = whole_blocks(range(8))
        inbox = channel.inbox("before", target.placer(pieces, range(8)))
        before = await inbox.collect(pieces)
        await inbox.close()

        await stop(child)
        inbox = channel.inbox("stopped", target.placer(pieces, range(8)))
        collecting = asyncio.create_task(inbox.collect(pieces))
        while transport.slots.num_free == NUM_SLOTS:
            await asyncio.sleep(0.001)
        started_s = time.monotonic()
        await inbox.close()
        close_s = time.monotonic() - started_s
        stopped = await collecting
        held = NUM_SLOTS - transport.slots.num_free
        target.memory.bytes[:] = 5  # the blocks have a new owner

        child.send_signal(signal.SIGCONT)
        async with asyncio.timeout(BOUND_S):
            while transport.slots.num_free < NUM_SLOTS:
                await transport.sweep()
                await asyncio.sleep(0.001)
        is_untouched = bool((target.memory.bytes == 5).all())
        inbox = channel.inbox("after", target.placer(pieces, range(8, 16)))
        after = await inbox.collect(pieces)
        await inbox.close()
        sent = np.random.default_rng(7).integers(0, 256, LAYOUT.pool_bytes, np.uint8)
        got = target.memory.bytes[8 * LAYOUT.block_bytes :]
        is_right = bool((got == sent[: 8 * LAYOUT.block_bytes]).all())

        await stop(child)  # once more, and this time the transport itself is closed meanwhile
        inbox = channel.inbox("closing", target.placer(pieces, range(8)))
        collecting = asyncio.create_task(inbox.collect(pieces))
        while transport.slots.num_free == NUM_SLOTS:
            await asyncio.sleep(0.001)
        async with asyncio.timeout(BOUND_S):
            await transport.close()
            closing = await collecting
        found = {
            "before": before, "stopped": stopped, "close_s": close_s, "held": held, "is_untouched": is_untouched,
            "after": after, "is_right": is_right, "closing": closing,
        }  # fmt: skip
        print(json.dumps(found), flush=True)
    finally:
        child.send_signal(signal.SIGCONT)
        child.kill()
        await child.wait()
        await target.stop()


if __name__ == "__main__":
    os.environ["UCX_TLS"] = "tcp"
    asyncio.run(main())
