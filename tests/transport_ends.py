"""Workers' ends of a KV transport for tests, in this process or, run as a program, in a process of its own that can be killed."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from workers.kv_memory.memory import KvLayout, KvMemory
from workers.status import WorkerAddress
from workers.transports.contract import IncomingPiece, OutgoingPiece, Transport, View
from workers.transports.factory import make_transports

HOST = "the-host"
TIMEOUT_S = 20.0
LAYOUT = KvLayout(16, 4, 2, 64, 64, "float32", 4)
"""A layer of 64 KiB, a block of 256 KiB, a pool of 4 MiB."""


@dataclass(slots=True)
class End:
    """One worker: its pool, one transport, and the gRPC server that its address names."""

    address: WorkerAddress
    memory: KvMemory
    transport: Transport
    server: grpc.aio.Server

    @classmethod
    async def start(
        cls, name: str, worker_id: str, generation: int = 1, layout: KvLayout = LAYOUT, timeout_s: float = TIMEOUT_S
    ) -> End:
        memory = KvMemory(layout)
        (transport,) = make_transports(
            [name], memory, worker_id=worker_id, host=HOST, listen_host="127.0.0.1", timeout_s=timeout_s
        ).values()
        server = grpc.aio.server()
        if hasattr(transport, "handlers"):
            server.add_generic_rpc_handlers(transport.handlers())
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return cls(WorkerAddress(worker_id, generation, f"127.0.0.1:{port}"), memory, transport, server)

    def fill(self, seed: int) -> None:
        self.memory.bytes[:] = np.random.default_rng(seed).integers(0, 256, self.memory.bytes.size, np.uint8)

    def outgoing(self, pieces: Sequence[IncomingPiece]) -> list[OutgoingPiece]:
        return [
            OutgoingPiece(p.piece, p.source_block, p.first_layer, p.num_layers,
                          self.memory.block(p.source_block, p.first_layer, p.num_layers))
            for p in pieces
        ]  # fmt: skip

    def placer(self, pieces: Sequence[IncomingPiece], blocks: Sequence[int]) -> Callable[[int], View]:
        """Puts the i-th piece into our block blocks[i]."""
        places = {p.piece: (block, p.first_layer, p.num_layers) for p, block in zip(pieces, blocks, strict=True)}

        def place(piece: int) -> View:
            if piece not in places:
                raise IndexError(piece)
            return self.memory.block(*places[piece])

        return place

    async def stop(self) -> None:
        await self.transport.close()
        await self.server.stop(0)
        self.memory.close()


def whole_blocks(blocks: Sequence[int], layout: KvLayout = LAYOUT, first_piece: int = 0) -> list[IncomingPiece]:
    """A piece for each of these blocks of the sender."""
    return [IncomingPiece(first_piece + i, block, 0, layout.num_layers) for i, block in enumerate(blocks)]


async def serve(name: str) -> None:
    """A sender that does what JSON lines on standard input tell it, and answers each."""
    end = await End.start(name, "prefill-0")
    end.fill(7)
    print(json.dumps({"target": end.address.target}), flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        command: dict[str, Any] = json.loads(line)
        target = WorkerAddress(*command["to"])
        if command["do"] == "offer":
            offer = end.transport.offer(target, HOST)
            print(json.dumps({"offer": base64.b64encode(offer or b"").decode()}), flush=True)
        else:
            await end.transport.send(target, command["transfer"], end.outgoing(whole_blocks(command["blocks"])))
            print(json.dumps({}), flush=True)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
