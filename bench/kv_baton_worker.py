"""One end of a Baton KV transport for bench/kv_handoff.py: moves blocks through the Transport protocol, every piece verified."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import struct
import time
import uuid
from typing import Any

import grpc
import kv_lines

from workers.kv_memory.checksum import checksums
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.kv_memory.pieces import Cut
from workers.status import WorkerAddress
from workers.transports.contract import Channel, IncomingPiece, OutgoingPiece, Transport
from workers.transports.factory import make_transports
from workers.transports.grpc_stream import GrpcTransport

LAYOUTS = {
    "bulk": KvLayout(256, 16, 2, 64, 128, "bfloat16", 2),
    "block": KvLayout(32, 28, 4, 64, 128, "bfloat16", 2),
    "tiny": KvLayout(64, 1, 1, 1, 16, "bfloat16", 2),
}
"""Layers of 64 KiB in blocks of 1 MiB; blocks of ERNIE-4.5-21B-A3B, 3.5 MiB; blocks of 64 bytes."""
ANNOUNCED_PIECES = 64
"""In one message, as with the default `transfer_window_bytes`; the receiver collects and verifies them together."""
TIMEOUT_S = 60.0
_ASK = struct.Struct("<16sIII")
_ANNOUNCED = struct.Struct("<IIIIQ")


def pieces_of(layout: KvLayout, first_block: int, num_bytes: int) -> list[IncomingPiece]:
    """`num_bytes` from a block on: whole blocks, or some layers of one."""
    if num_bytes < layout.block_bytes:
        return [IncomingPiece(0, first_block, 0, num_bytes // layout.layer_bytes)]
    cut = Cut(layout, 0, num_bytes // layout.block_bytes)
    slots = ((piece, cut.slot(piece)) for piece in range(cut.num_pieces))
    return [
        IncomingPiece(n, (first_block + slot.block) % layout.num_blocks, slot.first_layer, slot.num_layers)
        for n, slot in slots
    ]


class Session:
    """Sender or receiver; which one, the commands say."""

    def __init__(self, name: str, seals: bool) -> None:
        self._name, self._seals = name, seals
        self._memories: dict[str, KvMemory] = {}
        self._transports: dict[str, Transport] = {}
        self._channels: dict[str, Channel] = {}
        self._control: tuple[asyncio.StreamReader, asyncio.StreamWriter]
        self._tasks: set[asyncio.Task[None]] = set()
        self._filled: dict[tuple[str, int, int, int], int] = {}
        """Checksums of bulk pieces, made when they were first asked for: a sender makes them when a block is full,
        while the model computes the next one. Those of "block" and "tiny" are made each time anew."""
        self._servers: list[grpc.aio.Server] = []
        self._addresses: dict[str, str] = {}

    async def _open(self, worker_id: str) -> None:
        for shape, layout in LAYOUTS.items():
            memory = KvMemory(layout)
            memory.bytes[:] = 3 if worker_id == "prefill-0" else 0
            transport = make_transports(
                [self._name],
                memory,
                worker_id=worker_id,
                host="here",
                listen_host="127.0.0.1",
                timeout_s=TIMEOUT_S,
                seals=self._seals,
            )[self._name]
            server = grpc.aio.server()
            if isinstance(transport, GrpcTransport):
                server.add_generic_rpc_handlers(transport.handlers())
            self._addresses[shape] = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            self._memories[shape], self._transports[shape] = memory, transport
            self._servers.append(server)

    # ---- the sender ----

    async def on_listen(self) -> dict[str, Any]:
        await self._open("prefill-0")
        control = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 22)
        self._listening = control
        return {"control": control.sockets[0].getsockname()[1], "targets": self._addresses}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        shapes = tuple(LAYOUTS)
        target = WorkerAddress("decode-0", 1, "127.0.0.1:1")
        offers = {
            shape: base64.b64encode(self._transports[shape].offer(target, "here") or b"").decode() for shape in shapes
        }
        writer.write(json.dumps(offers).encode() + b"\n")
        while asked := await _exactly(reader, _ASK.size):
            transfer, shape_index, first_block, num_bytes = _ASK.unpack(asked)
            shape = shapes[shape_index]
            layout, memory, transport = LAYOUTS[shape], self._memories[shape], self._transports[shape]
            pieces = pieces_of(layout, first_block, num_bytes)
            for first in range(0, len(pieces), ANNOUNCED_PIECES):
                group = pieces[first : first + ANNOUNCED_PIECES]
                views = [memory.block(p.source_block, p.first_layer, p.num_layers) for p in group]
                rows = [self._announced(shape, piece, view) for piece, view in zip(group, views, strict=True)]
                writer.write(struct.pack("<I", len(rows)) + b"".join(rows))
                outgoing = [
                    OutgoingPiece(p.piece, p.source_block, p.first_layer, p.num_layers, view)
                    for p, view in zip(group, views, strict=True)
                ]
                task = asyncio.create_task(transport.send(target, transfer.hex(), outgoing))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                await asyncio.sleep(0)

    def _announced(self, shape: str, piece: IncomingPiece, view: Any) -> bytes:
        filled = (shape, piece.source_block, piece.first_layer, piece.num_layers)
        checksum = self._filled.get(filled) if shape == "bulk" else None
        if checksum is None:
            (checksum,) = checksums([view])
            self._filled[filled] = checksum
        return _ANNOUNCED.pack(piece.piece, *filled[1:], checksum)

    # ---- the receiver ----

    async def on_connect(self, peer: dict[str, Any]) -> dict[str, Any]:
        await self._open("decode-0")
        self._control = await asyncio.open_connection("127.0.0.1", peer["control"], limit=1 << 22)
        offers = json.loads(await self._control[0].readline())
        for shape, layout in LAYOUTS.items():
            source = WorkerAddress("prefill-0", 1, peer["targets"][shape])
            offer = base64.b64decode(offers[shape])
            self._channels[shape] = await self._transports[shape].connect(source, layout, offer)
        return {}

    async def on_measure(self, shape: str, num_bytes: int, repeats: int) -> dict[str, Any]:
        for turn in range(2):
            await self._fetch(shape, num_bytes, turn)
        seconds = [await self._fetch(shape, num_bytes, turn) for turn in range(repeats)]
        return {"median_s": statistics.median(seconds), "best_s": min(seconds)}

    async def _fetch(self, shape: str, num_bytes: int, turn: int) -> float:
        """Seconds from asking until every piece is in place and verified."""
        layout, memory = LAYOUTS[shape], self._memories[shape]
        reader, writer = self._control
        blocks = max(1, num_bytes // layout.block_bytes)
        first_block = turn * blocks % layout.num_blocks
        homes = {p.piece: p for p in pieces_of(layout, first_block, num_bytes)}

        def place(piece: int) -> Any:
            home = homes[piece]
            return memory.block(home.source_block, home.first_layer, home.num_layers)

        transfer = uuid.uuid4().bytes
        inbox = self._channels[shape].inbox(transfer.hex(), place)
        started = time.perf_counter()
        writer.write(_ASK.pack(transfer, list(LAYOUTS).index(shape), first_block, num_bytes))
        collecting: list[asyncio.Task[None]] = []
        missing = len(homes)
        while missing:
            (num_rows,) = struct.unpack("<I", await reader.readexactly(4))
            rows = list(_ANNOUNCED.iter_unpack(await reader.readexactly(num_rows * _ANNOUNCED.size)))
            missing -= num_rows
            collecting.append(asyncio.create_task(self._collect(inbox, rows, place)))
        await asyncio.gather(*collecting)
        elapsed = time.perf_counter() - started
        await inbox.close()
        return elapsed

    async def _collect(self, inbox: Any, rows: list[Any], place: Any) -> None:
        announced = [IncomingPiece(*row[:4]) for row in rows]
        arrived, lost = await inbox.collect(announced)
        if lost or len(arrived) != len(rows):
            raise RuntimeError(f"{len(lost)} pieces were lost")
        if getattr(inbox, "is_authenticated", False):
            return
        found = [inbox.checksum(piece.piece) for piece in announced]
        if None in found:
            views = [place(piece.piece) for piece in announced]
            inline = sum(view.nbytes for view in views) <= 1 << 20
            found = checksums(views) if inline else await asyncio.to_thread(checksums, views)
        if found != [row[4] for row in rows]:
            raise RuntimeError("a piece has another checksum than announced")


async def _exactly(reader: asyncio.StreamReader, num_bytes: int) -> bytes:
    try:
        return await reader.readexactly(num_bytes)
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("transport")
    parser.add_argument("--seal", action="store_true", help="encrypt, as between workers with certificates")
    args = parser.parse_args()
    asyncio.run(kv_lines.serve_async("this checkout", Session(args.transport, args.seal)))


if __name__ == "__main__":
    main()
