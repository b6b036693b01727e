"""Time to the first token with the prompt computed in another process, beside the same prompt computed in one: what a handoff adds.

python bench/handoff_ttft.py --model models/ernie-4.5-tiny --repeats 15
python bench/handoff_ttft.py --repeats 7 --lengths 128,512,1024        the dense 0.3B shape with random weights, bf16
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine_facts import machine_facts

from workers.config import WorkerConfig
from workers.kv_memory.checksum import checksums
from workers.request import HandoffReport, Request, SamplingParams
from workers.status import Role, WorkerAddress
from workers.wire.attach import Submit, WorkerLink
from workers.wire.grpc_client import GrpcWorkerClient
from workers.worker import Worker

TRANSPORTS = ("shm", "tcp")


@dataclass(frozen=True)
class Sample:
    """One request: seconds to its first token as its client saw it, and what the worker reported."""

    ttft_s: float
    report: HandoffReport

    @property
    def beside_s(self) -> float:
        """All but the computation of the prompt."""
        return self.ttft_s - self.report.prefill_s


class Client:
    """One attached worker."""

    def __init__(self, link: WorkerLink, address: WorkerAddress) -> None:
        self._link = link
        self._address = address
        self._frames = link.frames()

    async def first_token(self, request: Request, *prefill: WorkerAddress) -> Sample:
        started = time.perf_counter()
        self._link.send(Submit(request, self._address.generation, prefill))
        report: HandoffReport | None = None
        ttft_s = 0.0
        async for frame in self._frames:
            for output in frame.outputs:
                if output.request_id != request.request_id:
                    continue
                if output.handoff is not None:
                    ttft_s, report = time.perf_counter() - started, output.handoff
                if output.finish_reason is not None:
                    if report is None:
                        raise RuntimeError(f"the request failed: {output.message}")
                    return Sample(ttft_s, report)
        raise RuntimeError("the worker went away")


@asynccontextmanager
async def worker(settings: dict[str, Any], name: str, role: Role) -> AsyncIterator[WorkerAddress]:
    """A worker in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--serve", json.dumps({"settings": settings, "name": name, "role": role.value}),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdin is not None
    try:
        line = await process.stdout.readline()
        target, generation = json.loads(line)
        yield WorkerAddress(name, generation, target)
    finally:
        process.stdin.close()
        await process.wait()


async def serve(what: dict[str, Any]) -> None:
    """Until standard input ends."""
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in what["settings"].items()}
    one = Worker(WorkerConfig(**settings), what["name"], 1, Role(what["role"]))
    address = await one.start()
    print(json.dumps([address.target, address.generation]), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await one.stop()


async def measure(args: argparse.Namespace, model: str, dtype: str, vocab_size: int) -> list[dict[str, Any]]:
    lengths = [int(length) for length in args.lengths.split(",")]
    settings: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "kv_memory_bytes": args.kv_mib << 20,
        "max_model_len": max(lengths) + 64,
        "prefix_cache": False,
        "local_prefill_tokens": 0,
        "max_batch_tokens": args.chunk,
    }
    draw = random.Random(args.seed)
    async with AsyncExitStack() as stack:
        # MIXED, so that the very same process computes prompts for itself and for the others.
        source = await stack.enter_async_context(
            worker({**settings, "transports": TRANSPORTS}, "prefill-0", Role.MIXED)
        )
        connect = GrpcWorkerClient(1024, 30.0)

        async def attached(address: WorkerAddress) -> Client:
            link = connect.attach(address, "bench")
            stack.push_async_callback(link.close)
            return Client(link, address)

        alone = await attached(source)
        others: dict[str, Client] = {}
        for transport in TRANSPORTS:
            own = {**settings, "transports": [transport]}
            address = await stack.enter_async_context(worker(own, f"decode-{transport}", Role.DECODE))
            others[transport] = await attached(address)

        count = 0

        def prompt(length: int) -> Request:
            nonlocal count
            count += 1
            tokens = tuple(draw.randrange(10, vocab_size) for _ in range(length))
            return Request(f"r{count}", tokens, SamplingParams(max_tokens=2, temperature=0, seed=0, ignore_eos=True))

        rows = []
        for length in lengths:
            samples: dict[str, list[Sample]] = {name: [] for name in ("alone", *TRANSPORTS)}
            for repeat in range(args.repeats + 1):
                order = list(samples)
                draw.shuffle(order)
                for name in order:
                    request = prompt(length)
                    done = await (
                        alone.first_token(request) if name == "alone" else others[name].first_token(request, source)
                    )
                    if repeat:  # the first round connects and warms up
                        samples[name].append(done)
            rows += [row(length, name, samples) for name in samples]
        return rows


def row(length: int, name: str, samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """Medians in milliseconds. `ratio` is of whole TTFTs; `ratio_beside` takes the prompt's computation as equal, so that noise in
    it does not count: 1 + what the handoff adds beside the computation, over the TTFT alone."""

    def median(values: list[float]) -> float:
        return statistics.median(values) * 1000

    alone, these = samples["alone"], samples[name]
    ttft_ms, alone_ms = median([s.ttft_s for s in these]), median([s.ttft_s for s in alone])
    added_ms = median([s.beside_s for s in these]) - median([s.beside_s for s in alone])
    reports = [s.report for s in these]
    found: dict[str, Any] = {
        "tokens": length, "way": name, "ttft_ms": ttft_ms, "ratio": ttft_ms / alone_ms,
        "beside_ms": median([s.beside_s for s in these]), "ratio_beside": 1 + added_ms / alone_ms,
    }  # fmt: skip
    if name != "alone":
        if {r.transport for r in reports} != {name}:
            raise RuntimeError(f"{name} was not used: {sorted({r.transport for r in reports})}")
        kv_bytes = reports[0].kv_bytes
        checksum_s = checksum_seconds(kv_bytes)
        found |= {
            "kv_mib": kv_bytes / 2**20,
            "queue_ms": median([r.queue_s for r in reports]),
            "prefill_ms": median([r.prefill_s for r in reports]),
            "wait_ms": median([r.wait_s for r in reports]),
            "transfer_ms": median([r.transfer_s for r in reports]),
            "exposed_ms": median([r.exposed_s for r in reports]),
            "checksum_ms": checksum_s * 1000,
            "checksum_share": checksum_s / statistics.median(r.transfer_s for r in reports),
        }
    return found


def checksum_seconds(num_bytes: int, piece_bytes: int = 512 << 10) -> float:
    """Median of one side's checksums over so many bytes, read from memory."""
    data = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)
    pieces = [data[first : first + piece_bytes] for first in range(0, num_bytes, piece_bytes)]
    times = []
    for _ in range(7):
        started = time.perf_counter()
        checksums(pieces)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a checkpoint folder; default: dense 0.3B with random weights")
    parser.add_argument("--lengths", default="128,512,1024")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--chunk", type=int, default=512, help="max_batch_tokens")
    parser.add_argument("--kv-mib", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "baton" / "bench")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(json.loads(args.serve)))
        return
    if args.model:
        model, dtype = args.model, "float32"
    else:
        from model_shapes import SHAPES
        from random_checkpoints import random_checkpoint

        args.cache.mkdir(parents=True, exist_ok=True)
        model, dtype = str(random_checkpoint(SHAPES["dense"], args.cache)), "bfloat16"
    vocab_size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    rows = asyncio.run(measure(args, model, dtype, vocab_size))
    if args.json:
        print(json.dumps({"machine": machine_facts(), "rows": rows}))
        return
    print(machine_facts())
    names = [name for row in rows for name in row]
    columns = list(dict.fromkeys(names))
    print("".join(f"{name:>13}" for name in columns))
    for one in rows:
        cells = [one.get(name, "") for name in columns]
        print("".join(f"{cell:>13.2f}" if isinstance(cell, float) else f"{cell:>13}" for cell in cells))


if __name__ == "__main__":
    main()
