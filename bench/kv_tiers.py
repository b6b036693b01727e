"""Measures what a cached prefix is worth where it lies: time to first token of a prompt whose beginning is in the pool, in host
memory, on disk, at a peer, or nowhere. Real workers, each a process of its own, spoken to as a router does.

    python bench/kv_tiers.py --repeats 5 --json bench/results/kv_tiers.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from machine_facts import ForeignLoad, machine_facts
from model_shapes import SHAPES
from random_checkpoints import random_checkpoint

from workers.config import WorkerConfig
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.request import Request, SamplingParams
from workers.runner import BLOCK_SIZE
from workers.status import PrefixHint, Role, WorkerAddress
from workers.wire.attach import Submit, WorkerLink
from workers.wire.grpc_client import GrpcWorkerClient
from workers.worker import Worker

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "models" / "ernie-4.5-tiny"
PREFIX_BLOCKS = 32
TAIL_TOKENS = 16
POOL_BLOCKS = 36
"""A filler prompt of this size pushes everything else out of a worker's pool."""
CASES = ("nowhere", "pool", "host", "disk", "disk, not in the page cache", "peer")


def checkpoint(name: str, cache: Path) -> tuple[Path, str]:
    """Folder and dtype."""
    return (SHIPPED, "float32") if name == "shipped" else (random_checkpoint(SHAPES[name], cache), "bfloat16")


def base_config(folder: Path, dtype: str, num_threads: int) -> WorkerConfig:
    model = ErnieConfig.load(folder)
    itemsize = 4 if dtype == "float32" else 2
    block_bytes = model.num_layers * 2 * model.num_kv_heads * BLOCK_SIZE * model.head_dim * itemsize
    return WorkerConfig(
        model=str(folder),
        dtype=dtype,
        num_threads=num_threads,
        max_model_len=POOL_BLOCKS * BLOCK_SIZE,
        kv_memory_bytes=POOL_BLOCKS * block_bytes,
        max_num_seqs=4,
    )


# ---- one worker's process ----


async def serve(config: WorkerConfig, name: str) -> None:
    worker = Worker(config, name, 1, Role.MIXED)
    address = await worker.start()
    print(json.dumps(asdict(address)), flush=True)
    await asyncio.to_thread(sys.stdin.read)  # the parent's end closes with it
    await worker.stop()


@contextlib.contextmanager
def started(config: WorkerConfig, name: str) -> Iterator[WorkerAddress]:
    command = [sys.executable, __file__, "--serve", json.dumps(asdict(config)), name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield WorkerAddress(**json.loads(process.stdout.readline()))
    finally:
        process.stdin.close()
        process.wait(timeout=30)


# ---- the router's end ----


class Asked:
    """One attached worker."""

    def __init__(self, client: GrpcWorkerClient, address: WorkerAddress) -> None:
        self.address = address
        self._client = client
        self._link: WorkerLink = client.attach(address, "bench")
        self._frames = self._link.frames()
        self._count = 0

    async def first_token(self, prompt: list[int], hint: PrefixHint | None = None) -> tuple[float, int, int]:
        """Seconds from submission to the first token, the token, and how many prompt tokens were cached."""
        self._count += 1
        name = f"{self.address.worker_id}-{self._count}"
        params = SamplingParams(max_tokens=1, temperature=0, seed=0, ignore_eos=True)
        request = Request(name, tuple(prompt), params)
        started_s = time.perf_counter()
        self._link.send(Submit(request, self.address.generation, (), prefix=hint))
        async for frame in self._frames:
            for output in frame.outputs:
                if output.request_id == name:
                    if output.refusal is not None:
                        raise RuntimeError(output.message)
                    return time.perf_counter() - started_s, output.token_ids[0], output.cached_tokens
        raise RuntimeError("the worker is gone")

    async def counters(self) -> dict[str, float]:
        return dict((await self._client.describe(self.address)).counters)

    async def written(self) -> None:
        """Until the disk tier has nothing left to write."""
        before = -1.0
        while (now := (await self.counters()).get("kv_disk_stored_blocks", 0.0)) != before:
            before = now
            await asyncio.sleep(0.5)

    async def close(self) -> None:
        await self._link.close()


@contextlib.asynccontextmanager
async def attached(addresses: dict[str, WorkerAddress]) -> AsyncIterator[dict[str, Asked]]:
    client = GrpcWorkerClient()
    asked = {name: Asked(client, address) for name, address in addresses.items()}
    try:
        yield asked
    finally:
        for one in asked.values():
            await one.close()


def forget_pages(folder: Path) -> None:
    """Takes the files out of the kernel's page cache, so that the next read is the disk's."""
    os.sync()
    for path in folder.rglob("*.kv"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def words(seed: int, count: int, vocab_size: int) -> list[int]:
    """A prompt that shares no block with one of another seed."""
    return [3 + (seed * 7919 + i * (31 + seed)) % (vocab_size - 3) for i in range(count)]


async def one_round(asked: dict[str, Asked], number: int, vocab_size: int, disk: Path) -> dict[str, float]:
    """TTFT in seconds of each case; the first token must be the same in all of them."""
    prefix = words(2 * number + 1, PREFIX_BLOCKS * BLOCK_SIZE, vocab_size)
    filler = words(2 * number + 2, POOL_BLOCKS * BLOCK_SIZE - 2, vocab_size)
    prompt = prefix + words(9999, TAIL_TOKENS, vocab_size)
    seconds: dict[str, float] = {}
    tokens: set[int] = set()

    async def take(case: str, worker: str, hint: PrefixHint | None = None) -> None:
        seconds[case], token, cached = await asked[worker].first_token(prompt, hint)
        tokens.add(token)
        expected = 0 if case == "nowhere" else len(prefix)
        if cached != expected:
            raise RuntimeError(f"{case}: {cached} tokens came from a cache, not {expected}")

    await take("nowhere", "holder")
    await take("pool", "holder")
    await take("peer", "plain", PrefixHint(asked["holder"].address, PREFIX_BLOCKS))
    for worker, cases in (("host", ("host",)), ("disk", ("disk", "disk, not in the page cache"))):
        await asked[worker].first_token(prompt)
        for case in cases:
            await asked[worker].first_token(filler)
            await asked[worker].written()
            if case.startswith("disk,"):
                forget_pages(disk)
            await take(case, worker)
    if len(tokens) != 1:
        raise RuntimeError(f"the first token depends on where the prefix was: {tokens}")
    return seconds


async def measure(name: str, cache: Path, repeats: int, num_threads: int) -> dict[str, list[float]]:
    folder, dtype = checkpoint(name, cache)
    config = base_config(folder, dtype, num_threads)
    vocab_size = ErnieConfig.load(folder).vocab_size
    with tempfile.TemporaryDirectory(dir=cache) as scratch, contextlib.ExitStack() as stack:
        configs = {
            "plain": config,
            "holder": replace(config, kv_memory_bytes=8 * config.kv_memory_bytes),
            "host": replace(config, kv_host_bytes=8 * config.kv_memory_bytes),
            "disk": replace(config, kv_disk_folder=scratch, kv_disk_bytes=8 << 30),
        }
        addresses = {worker: stack.enter_context(started(each, worker)) for worker, each in configs.items()}
        async with attached(addresses) as asked:
            rounds = []
            for number in range(repeats + 1):
                rounds.append(await one_round(asked, number, vocab_size, Path(scratch)))
                print(f"{name}: round {number}", {k: round(v, 4) for k, v in rounds[-1].items()}, file=sys.stderr)
            counters = {worker: await one.counters() for worker, one in asked.items()}
    pulled = counters["plain"].get("prefix_pulled_blocks", 0)
    if pulled < repeats * PREFIX_BLOCKS:
        raise RuntimeError(f"only {pulled:.0f} blocks came from the peer")
    return {case: [one[case] for one in rounds[1:]] for case in CASES}  # the first round warms up


def table(figures: dict[str, list[float]]) -> str:
    """Medians and the best round: on a busy machine the best is the fairer one, since what computes longest waits most."""
    lines = [
        "| prefix is in | TTFT, ms: median | best | median / nowhere | best / nowhere |",
        "|---|---:|---:|---:|---:|",
    ]
    nowhere = figures["nowhere"]
    for case in CASES:
        median, best = statistics.median(figures[case]), min(figures[case])
        ratios = f"{median / statistics.median(nowhere):.3f} | {best / min(nowhere):.3f}"
        lines.append(f"| {case} | {1000 * median:.1f} | {1000 * best:.1f} | {ratios} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["dense", "shipped"], choices=[*SHAPES, "shipped"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each worker")
    parser.add_argument("--cache", type=Path, default=Path("bench/results/cache"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=2, metavar=("CONFIG", "NAME"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        config, name = args.serve
        fields = json.loads(config)
        asyncio.run(serve(WorkerConfig(**{**fields, "transports": tuple(fields["transports"])}), name))
        return 0
    args.cache.mkdir(parents=True, exist_ok=True)
    load, facts = ForeignLoad(), machine_facts()
    found = {name: asyncio.run(measure(name, args.cache, args.repeats, args.threads)) for name in args.models}
    share = load.share()
    print(f"{facts['date']}, {facts['cpu']}, {facts['num_cores']} cores, {args.threads} threads a worker.")
    print(f"{args.repeats} rounds. Other programs took {100 * share:.0f}% of the cores.")
    for name, figures in found.items():
        print(f"\n#### {name}\n\n{table(figures)}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**facts, "foreign_share": share, "ttft_s": found}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
