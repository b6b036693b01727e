"""What mutual TLS adds to gRPC between two processes: a frame of tokens, its processor time, and a new connection; with it and without, in alternation.

python bench/tls_cost.py --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from engine_report import number, table
from machine_facts import ForeignLoad

from cluster.identity.folder import config_of, make_folder, members
from workers.pb import worker_pb2 as pb
from workers.trust.channels import bind, make_server, open_channel
from workers.trust.credentials import Credentials, credentials_of
from workers.trust.parties import Party, router, worker
from workers.wire.streams import ROUTER_CHANNEL, SERVER

METHOD = "/baton.workers.Worker/Attach"
WORKER, ROUTER = worker("decode-0"), router("router-0")
SIZES = {"1 token": 1, "32 tokens": 32}


def identity(folder: str, party: Party) -> Credentials | None:
    """None where there is no folder: without TLS."""
    return credentials_of(config_of(Path(folder)), party) if folder else None


async def serve(folder: str, pipe: Connection) -> None:
    """A worker that answers each message with a frame of as many tokens as its number says."""
    own = identity(folder, WORKER)
    server = make_server(SERVER, own)

    async def attach(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for message in messages:
            count = pb.RouterMessage.FromString(message).number
            outputs = [
                pb.Output(request_id=f"request-{i}#1", position=9, token_ids=[i], text=" word") for i in range(count)
            ]
            yield pb.WorkerFrame(generation=1, outputs=outputs).SerializeToString()

    handler = grpc.stream_stream_rpc_method_handler(attach)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("baton.workers.Worker", {"Attach": handler}),)
    )
    port = bind(server, "127.0.0.1", 0, own)
    await server.start()
    pipe.send(port)
    while (await asyncio.to_thread(pipe.recv)) is not None:
        pipe.send(cpu_s())
    await server.stop(0)


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def measure(folder: str, pipe: Connection, port: int, repeats: int) -> dict[str, float]:
    own = identity(folder, ROUTER)
    found: dict[str, float] = {}
    dials = []
    for _ in range(20):
        started_s = time.perf_counter()
        async with open_channel(f"127.0.0.1:{port}", ROUTER_CHANNEL, own, WORKER) as channel:
            await channel.channel_ready()
        dials.append(time.perf_counter() - started_s)
    found["a new connection, ms"] = statistics.median(dials) * 1e3
    async with open_channel(f"127.0.0.1:{port}", ROUTER_CHANNEL, own, WORKER) as channel:
        call = channel.stream_stream(METHOD)()
        for name, count in SIZES.items():
            ask = pb.RouterMessage(number=count).SerializeToString()
            times = []
            for turn in range(repeats + 50):
                if turn == 50:
                    pipe.send(True)
                    before_s = cpu_s() + pipe.recv()
                started_s = time.perf_counter()
                await call.write(ask)
                pb.WorkerFrame.FromString(await call.read())
                times.append(time.perf_counter() - started_s)
            pipe.send(True)
            found[f"there and back, {name}, us"] = statistics.median(times[50:]) * 1e6
            found[f"processor time of both, {name}, us"] = (cpu_s() + pipe.recv() - before_s) / repeats * 1e6
        call.cancel()
    return found


def run(folder: str, repeats: int) -> dict[str, float]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serving, args=(folder, theirs))
    process.start()
    try:
        return asyncio.run(measure(folder, ours, ours.recv(), repeats))
    finally:
        ours.send(None)
        process.join()


def serving(folder: str, pipe: Connection) -> None:
    asyncio.run(serve(folder, pipe))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1000)
    args = parser.parse_args()
    load = ForeignLoad()
    figures: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as made:
        folder = Path(made, "tls")
        make_folder(folder, members([WORKER.id], [ROUTER.id]), 10)
        for _ in range(args.rounds):
            for is_on in (False, True):
                figures[is_on].append(run(str(folder) if is_on else "", args.repeats))
    best = {is_on: {name: min(one[name] for one in rounds) for name in rounds[0]} for is_on, rounds in figures.items()}
    rows = [[name, number(best[False][name], 2), number(best[True][name], 2)] for name in best[False]]
    print(f"Best of {args.rounds} rounds; other programs took {load.share():.0%} of the cores.\n")
    print("\n".join(table(["", "without TLS", "with TLS"], rows)))


if __name__ == "__main__":
    main()
