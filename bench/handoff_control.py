"""What the control plane of one KV handoff costs: a prompt that is computed already goes from one process to another over shared memory.

python bench/handoff_control.py                       one block of 64 tokens, 0.5 MiB
python bench/handoff_control.py --tokens 131072 --repeats 3

Prints wall time and CPU time of both processes for a whole handoff, beside a bare gRPC stream that carries as many messages, and what
the parts of it that are Python's cost by themselves. No model runs and no engine; prompts, sessions, messages, seals, gRPC and copies are
the product's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import pairwise
from typing import Any

import grpc
from machine_facts import machine_facts

from workers.config import WorkerConfig
from workers.handoff.copier import describe_pieces, verify_pieces
from workers.handoff.protobuf import down_from_pb, down_to_pb, then_to_pb, up_from_pb, up_to_pb
from workers.handoff.protocol.messages import (
    HandoffAccepted,
    KvPieces,
    Offer,
    OpenHandoff,
    PrefillDone,
    PromptSubject,
    ReleaseHandoff,
    UseTransport,
)
from workers.handoff.protocol.source_session import Described, Filled, SendPieces, Sent, SourceSession
from workers.handoff.protocol.target_session import Collect, Collected, Connected, Land, TargetSession
from workers.handoff.source_driver import ExportFeed, HandoffExport
from workers.handoff.transfers import Transfers
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.kv_memory.pieces import Cut
from workers.pb import worker_pb2 as pb
from workers.pb import worker_pb2_grpc
from workers.request import Request, SamplingParams
from workers.runner import BLOCK_SIZE
from workers.status import Identity, Role, WorkerAddress
from workers.transports.factory import make_transports
from workers.wire.streams import HANDOFF_CHANNEL, SERVER, Sealer, Unsealer

FLOOR = "baton.bench.Floor"
HOST = "127.0.0.1"


def layout_of(tokens: int) -> KvLayout:
    """Blocks as those of the dense 0.3B shape with 8 layers: 64 KiB a layer, 512 KiB a block, one piece each."""
    return KvLayout(-(-tokens // BLOCK_SIZE) + 1, 8, 2, BLOCK_SIZE, 128, "bfloat16", 2)


class Computed:
    """Exports a prompt that needs no computation: blocks 0 .. n-1 of the pool are its."""

    is_paced = False

    def __init__(self, cut: Cut, feed: ExportFeed) -> None:
        self._cut, self._feed = cut, feed

    def start(self) -> None:
        cut = self._cut
        end = cut.first_block + cut.num_blocks
        self._feed(Filled(tuple(range(end)), cut.first_block, end, cut.layout.num_layers))
        self._feed(PrefillDone(17, None, cut.num_pieces, 0, 0.01))

    def acknowledged(self, num_pieces: int) -> None: ...

    def release(self, reason: str) -> None: ...


class Service(worker_pb2_grpc.WorkerServicer):  # type: ignore[misc]
    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers

    async def Handoff(
        self, request_iterator: AsyncIterator[pb.HandoffDown], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.HandoffUp]:
        async for message in self._transfers.serving.serve(request_iterator):
            yield message


def transfers_of(name: str, generation: int, target: str, memory: KvMemory) -> Transfers:
    config = WorkerConfig(model="fake", host=HOST)
    made = make_transports(["shm"], memory, worker_id=name, host=socket.gethostname(), listen_host=HOST, timeout_s=30.0)
    identity = Identity(name, Role.MIXED, generation, target)

    def open_export(opening: OpenHandoff, generation: int, feed: ExportFeed) -> HandoffExport:
        return Computed(Cut(memory.layout, opening.first_block, opening.num_blocks), feed)

    return Transfers(config, identity, memory, "bench", made, open_export, Counter(), time.monotonic)


async def serve(tokens: int) -> None:
    """The sending process, until standard input ends; a line asks for the CPU time so far."""
    memory = KvMemory(layout_of(tokens))
    memory.bytes[:] = 3
    server = grpc.aio.server(options=SERVER)
    target = f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}"
    transfers = transfers_of("prefill-0", 1, target, memory)
    worker_pb2_grpc.add_WorkerServicer_to_server(Service(transfers), server)  # type: ignore[no-untyped-call]

    async def echo(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async for message in messages:
            yield message

    method = grpc.stream_stream_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(FLOOR, {"Echo": method}),))
    await server.start()
    print(target, flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(time.process_time(), flush=True)
    await transfers.close()
    await server.stop(0)


class Peer:
    """The sending process as the receiving one sees it."""

    def __init__(self, process: asyncio.subprocess.Process, address: WorkerAddress) -> None:
        self._process, self.address = process, address

    @classmethod
    async def start(cls, tokens: int) -> Peer:
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--serve", "--tokens", str(tokens),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        return cls(process, WorkerAddress("prefill-0", 1, (await process.stdout.readline()).decode().strip()))

    async def cpu_s(self) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(b"\n")
        return float(await self._process.stdout.readline())

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


async def timed(peer: Peer, repeats: int, once: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of one call: wall time (best and median), CPU time of both processes (mean)."""
    for _ in range(min(20, repeats)):
        await once()
    walls = []
    theirs, ours = await peer.cpu_s(), time.process_time()
    for _ in range(repeats):
        started = time.perf_counter()
        await once()
        walls.append(time.perf_counter() - started)
    ours = time.process_time() - ours
    theirs = await peer.cpu_s() - theirs
    return {
        "wall_best_us": min(walls) * 1e6, "wall_p50_us": statistics.median(walls) * 1e6,
        "receiver_cpu_us": ours / repeats * 1e6, "sender_cpu_us": theirs / repeats * 1e6,
    }  # fmt: skip


async def measure(tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    peer = await Peer.start(tokens)
    memory = KvMemory(layout_of(tokens))
    transfers = transfers_of("decode-0", 1, f"{HOST}:1", memory)
    blocks = tuple(range(memory.layout.num_blocks - 1))
    request = Request("r", tuple(range(10, 10 + tokens)), SamplingParams(max_tokens=2, seed=0))

    async def handoff() -> None:
        await transfers.receive(peer.address, PromptSubject(request), 0, blocks)

    channel = grpc.aio.insecure_channel(peer.address.target, options=HANDOFF_CHANNEL)
    stream = channel.stream_stream(f"/{FLOOR}/Echo")

    async def floor(rounds: int) -> None:
        call = stream()
        for _ in range(rounds):
            await call.write(b"x" * 200)
            await call.read()
        await call.done_writing()
        await call.read()

    try:
        return {
            "handoff": await timed(peer, repeats, handoff),
            "bare stream, 1 message each way": await timed(peer, repeats, lambda: floor(1)),
            "bare stream, 2 messages each way": await timed(peer, repeats, lambda: floor(2)),
        }
    finally:
        await channel.close()
        await transfers.close()
        await peer.stop()


# ---- the parts that are Python's ----


def parts(tokens: int, repeats: int) -> dict[str, float]:
    """Least microseconds of each part of a handoff of these tokens, on one thread, without gRPC and asyncio."""
    layout = layout_of(tokens)
    source_memory, target_memory = KvMemory(layout), KvMemory(layout)
    num_blocks = layout.num_blocks - 1
    blocks = tuple(range(num_blocks))
    request = Request("r", tuple(range(10, 10 + tokens)), SamplingParams(max_tokens=2, seed=0))
    us = WorkerAddress("decode-0", 1, "127.0.0.1:5555")
    opening = OpenHandoff(us, HOST, 1, "bench", layout, PromptSubject(request), 0, num_blocks, ("shm",))
    accepted = HandoffAccepted((Offer("shm", b"x" * 120),), layout, HOST)
    found: dict[str, float] = {}

    marks: list[tuple[str, float]] = []

    def note(name: str) -> None:
        """What was done since the mark before."""
        marks.append((name, time.perf_counter()))

    def carry_down(message: Any, sealer: Sealer, unsealer: Unsealer) -> Any:
        envelope = sealer.seal(down_to_pb("0" * 32, 1, message))
        wire = envelope.SerializeToString()
        note("messages: write")
        envelope = pb.HandoffDown.FromString(wire)
        unsealer.check(envelope)
        message = down_from_pb(envelope)
        note("messages: read")
        return message

    def carry_up(message: Any, sealer: Sealer, unsealer: Unsealer) -> Any:
        envelope = sealer.seal(up_to_pb("0" * 32, 1, message))
        wire = envelope.SerializeToString()
        note("messages: write")
        envelope = pb.HandoffUp.FromString(wire)
        unsealer.check(envelope)
        message = up_from_pb(envelope)
        note("messages: read")
        return message

    for _ in range(repeats):
        marks[:] = [("", time.perf_counter())]
        down, up = (Sealer(), Unsealer()), (Sealer(), Unsealer())
        now = 0.0
        cut = Cut(layout, 0, num_blocks)
        target = TargetSession(cut, opening, 30.0)
        target.open(now)
        source_cut = Cut(layout, 0, num_blocks)
        source = SourceSession(source_cut, accepted, 30.0, 1 << 40)
        source.open(now)
        note("sessions")
        carry_down(opening, *down)
        heard = carry_up(accepted, *up)
        target.handle(heard, now)
        (use, *_) = target.handle(Connected(0), now)
        note("sessions")
        used = carry_down(use.message, *down)  # type: ignore[union-attr]
        assert isinstance(used, UseTransport)
        source.handle(used, now)
        commands = source.handle(Filled(blocks, 0, num_blocks, layout.num_layers), now)
        note("sessions")
        (sending,) = commands
        assert isinstance(sending, SendPieces)
        described = describe_pieces(source_memory, source_cut, sending.pieces)
        note("checksums, sender")
        source.handle(Described(0, described), now)
        source.handle(Sent(0), now)
        note("sessions")
        # The product says what waits in one write: the last pieces and the end.
        envelope = up_to_pb("0" * 32, 1, KvPieces(described, 0))
        then_to_pb(envelope, [PrefillDone(17, None, cut.num_pieces, 0, 0.01)])
        wire = up[0].seal(envelope).SerializeToString()
        note("messages: write")
        envelope = pb.HandoffUp.FromString(wire)
        up[1].check(envelope)
        heard, done = (up_from_pb(part) for part in (envelope, *envelope.then))
        note("messages: read")
        (collect,) = target.handle(heard, now)
        note("sessions")
        assert isinstance(collect, Collect)

        def place(piece: int, cut: Cut = cut) -> Any:
            slot = cut.slot(piece)
            return target_memory.block(blocks[slot.block], slot.first_layer, slot.num_layers)

        good = verify_pieces(described, place)
        note("checksums, receiver")
        target.handle(Collected(tuple(p.piece for p in described) or good), now)
        assert any(isinstance(command, Land) for command in target.handle(done, now))
        note("sessions")
        released = carry_down(ReleaseHandoff(), *down)
        source.handle(released, now)
        note("sessions")
        spent: Counter[str] = Counter()
        for (_, began), (name, ended) in pairwise(marks):
            spent[name] += (ended - began) * 1e6
        for name, us_spent in spent.items():
            found[name] = min(found.get(name, us_spent), us_spent)
    return found


def lines(results: dict[str, Any]) -> Sequence[str]:
    rows = [f"{results['machine']}", f"{results['tokens']} tokens"]
    for name, figures in results["processes"].items():
        rows.append(f"{name:34}" + "".join(f"  {key} {value:8.0f}" for key, value in figures.items()))
    rows += [f"{name:34}  {value:8.1f} us" for name, value in results["parts"].items()]
    rows.append(f"{'all parts of messages and sessions':34}  {sum(_control(results['parts'])):8.1f} us")
    return rows


def _control(found: dict[str, float]) -> list[float]:
    return [value for name, value in found.items() if not name.startswith("checksums")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.tokens))
        return
    processes = asyncio.run(measure(args.tokens, args.repeats))
    results = {
        "machine": machine_facts(), "tokens": args.tokens, "processes": processes,
        "parts": parts(args.tokens, args.repeats),
    }  # fmt: skip
    print(json.dumps(results) if args.json else "\n".join(lines(results)))


if __name__ == "__main__":
    main()
