"""What only NIXL needs: reads cannot be taken back there, so a pool must be safe from those that come late; and a worker starts without it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import nixl_stalled
import pytest
from transport_ends import HOST, LAYOUT, End, whole_blocks

from workers.errors import TransferFailed
from workers.kv_memory.memory import KvMemory
from workers.transports.factory import make_transports
from workers.transports.nixl_agent import installed

ROOT = Path(__file__).resolve().parents[2]
needs_nixl = pytest.mark.skipif(installed() is None, reason="NIXL is not installed: pip install 'baton-serve[nixl]'")


@needs_nixl
@pytest.mark.timeout(240)
async def test_a_read_from_a_sender_that_stands_still_never_writes_into_blocks_that_were_given_up() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, nixl_stalled.__file__, stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "UCX_TLS": "tcp"},
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode == 0
    found = json.loads(output)
    assert found["before"] == [list(range(8)), []]
    assert found["stopped"] == [[], list(range(8))] and found["held"] > 0
    assert found["close_s"] < nixl_stalled.TIMEOUT_S
    assert found["is_untouched"] and found["is_right"]
    assert found["after"] == [list(range(8)), []]
    assert found["closing"] == [[], list(range(8))]


@needs_nixl
async def test_metadata_that_is_none_is_refused_and_harms_nobody() -> None:
    source, target = await End.start("nixl", "prefill-0"), await End.start("nixl", "decode-0")
    try:
        offer = source.transport.offer(target.address, HOST)
        assert offer is not None
        fields = json.loads(offer)
        for metadata in ("", "AAAA", "?", fields["metadata"][:40], fields["metadata"][::-1]):
            forged = json.dumps(fields | {"metadata": metadata}).encode()
            with pytest.raises(TransferFailed):
                await target.transport.connect(source.address, LAYOUT, forged)
        for address in (0, -1, 1 << 80, fields["address"] + LAYOUT.pool_bytes):
            forged = json.dumps(fields | {"address": address}).encode()
            with pytest.raises(TransferFailed):
                await target.transport.connect(source.address, LAYOUT, forged)
        channel = await target.transport.connect(source.address, LAYOUT, offer)
        # Nor does it harm those who are connected to the same sender.
        with pytest.raises(TransferFailed):
            await target.transport.connect(source.address, LAYOUT, json.dumps(fields | {"nonce": "00" * 16}).encode())
        source.fill(3)
        pieces = whole_blocks([1, 2])
        inbox = channel.inbox("t", target.placer(pieces, [3, 4]))
        assert await inbox.collect(pieces) == ((0, 1), ())
        await inbox.close()
    finally:
        await target.stop()
        await source.stop()


@needs_nixl
async def test_nixl_says_nothing_on_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    end = await End.start("nixl", "prefill-0")
    await end.stop()
    assert capfd.readouterr().out == ""


def test_a_worker_without_the_wheel_starts_without_the_transport_and_imports_nothing_for_it() -> None:
    program = (
        "import sys\n"
        "sys.modules.update(nixl_cu12=None, nixl_cu13=None)\n"  # as if they were not there
        "from workers.kv_memory.memory import KvLayout, KvMemory\n"
        "from workers.transports.factory import make_transports\n"
        "memory = KvMemory(KvLayout(4, 1, 1, 64, 16, 'float32', 4))\n"
        "made = make_transports(['nixl', 'shm'], memory, worker_id='w', host='h', listen_host='127.0.0.1', timeout_s=1)\n"
        "assert list(made) == ['shm'], made\n"
        "assert not [name for name in sys.modules if 'nixl_cu' in name and sys.modules[name]], 'imported'\n"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


@needs_nixl
async def test_a_worker_with_the_wheel_has_it_before_tcp() -> None:
    memory = KvMemory(LAYOUT)
    made = make_transports(
        ["shm", "nixl", "tcp"], memory, worker_id="w", host=HOST, listen_host="127.0.0.1", timeout_s=5.0
    )
    assert list(made) == ["shm", "nixl", "tcp"]
    for transport in made.values():
        await transport.close()
