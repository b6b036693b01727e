"""Measures the gap that a client sees when its stream moves to another decode worker, in token intervals of the same stream.

Two workers in processes of their own, a router in this one. Streams run on one worker; it is drained, so that all of them move to
the other one; then back again. Of each move two intervals between tokens count, over the stream's median interval: the one in which
the stream switched, and the longest one while anything moved. Beside them stands the longest one in a span of the same length just
before, which tells how noisy the machine is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # this checkout is measured, whatever is installed

from machine_facts import ForeignLoad, machine_facts  # noqa: E402

from router.api.job_outputs import JobOutputs  # noqa: E402
from router.config import RouterConfig  # noqa: E402
from router.driver import RouterDriver  # noqa: E402
from workers.config import WorkerConfig  # noqa: E402
from workers.request import Request, SamplingParams  # noqa: E402
from workers.status import Role, WorkerAddress  # noqa: E402

TINY = REPOSITORY / "models" / "ernie-4.5-tiny"
POOL_BYTES = {"tiny": 200_000_000, "dense": 1_000_000_000}
WARM_UP_TOKENS = 24
BETWEEN_TOKENS = 40
"""Tokens of each stream between two moves, from which its usual interval is known."""
TARGET_INTERVALS = 2.0


@dataclass(slots=True)
class Stream:
    """When each output of one request arrived, and the longest interval around each of its moves."""

    times_s: list[float] = field(default_factory=list)
    switches_s: list[float] = field(default_factory=list)
    """The interval between the last token of one worker and the first of the next, of each move."""
    gaps_s: list[float] = field(default_factory=list)
    calm_s: list[float] = field(default_factory=list)
    """The longest interval in a span of the same length before each move."""
    num_tokens: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(self, outputs: Any, where: Callable[[], str]) -> None:
        """`where` says which worker the stream runs on."""
        worker = ""
        generation, is_over = JobOutputs([outputs]), False
        while not is_over:
            ((_, output),) = await generation.next_batch()
            is_over = output.finish_reason is not None
            if output.token_ids:
                self.times_s.append(time.perf_counter())
                before, worker = worker, where()
                if before not in ("", worker):
                    self.switches_s.append(self.times_s[-1] - self.times_s[-2])
                self.num_tokens += len(output.token_ids)
                self.changed.set()

    async def more(self, num_tokens: int) -> None:
        wanted = self.num_tokens + num_tokens
        async with asyncio.timeout(600):
            while self.num_tokens < wanted:
                self.changed.clear()
                await self.changed.wait()

    @property
    def median_s(self) -> float:
        return statistics.median(self.intervals())

    def intervals(self, since_s: float = 0.0, until_s: float = float("inf")) -> list[float]:
        """Those that touch a span of time."""
        pairs = zip(self.times_s, self.times_s[1:], strict=False)
        return [after - before for before, after in pairs if after >= since_s and before <= until_s]


class WorkerProcess:
    """A worker in a process of its own (`--worker`), as an actor would run it, without Ray."""

    def __init__(self, process: asyncio.subprocess.Process, address: WorkerAddress) -> None:
        self._process = process
        self.address = address

    @classmethod
    async def start(cls, name: str, model: Path, args: argparse.Namespace, kind: str) -> WorkerProcess:
        config = {
            "model": str(model),
            "dtype": args.dtype,
            "num_threads": args.threads,
            "max_model_len": 4096,
            "kv_memory_bytes": POOL_BYTES[kind],
            "transports": (args.transport,),
        }
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps([name, config])]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY
        )
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 120)
        return cls(process, WorkerAddress(*json.loads(line)))

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


async def run_worker(name: str, settings: dict[str, Any]) -> None:
    """Serves until stdin ends."""
    from workers.worker import Worker

    settings["transports"] = tuple(settings["transports"])
    worker = Worker(WorkerConfig(**settings), name, 1, Role.MIXED)
    address = await worker.start()
    print(json.dumps([address.worker_id, address.generation, address.target]), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await worker.stop()


async def measure(kind: str, model: Path, num_streams: int, args: argparse.Namespace) -> dict[str, Any]:
    """One table row."""
    workers = [await WorkerProcess.start(f"decode-{at}", model, args, kind) for at in range(2)]
    driver = RouterDriver(RouterConfig(model=str(model), max_migrations=args.at_once, rebalance=False), "bench")
    await driver.start()
    try:
        driver.set_workers([worker.address for worker in workers])
        while len([view for view in driver.status().workers if view.connected]) < 2:
            await asyncio.sleep(0.05)
        return await _measure(driver, num_streams, args) | {"model": kind, "streams": num_streams}
    finally:
        await driver.stop()
        for worker in workers:
            await worker.stop()


async def _measure(driver: RouterDriver, num_streams: int, args: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(1)
    vocab = driver.model.vocab_size if driver.model else 1000
    await driver.set_draining("decode-1", True)
    streams = [Stream() for _ in range(num_streams)]
    tasks = []
    for index, stream in enumerate(streams):
        prompt = tuple(rng.randrange(300, vocab) for _ in range(args.prompt))
        params = SamplingParams(max_tokens=3900 - args.prompt, temperature=0, seed=0, ignore_eos=True)
        outputs = driver.submit(Request(f"r{index}", prompt, params))
        tasks.append(asyncio.create_task(stream.follow(outputs, partial(where, driver, f"r{index}"))))
    await asyncio.gather(*(stream.more(WARM_UP_TOKENS) for stream in streams))
    begun_s = time.perf_counter()
    for turn in range(args.rounds):
        source, target = ("decode-0", "decode-1") if turn % 2 == 0 else ("decode-1", "decode-0")
        await driver.set_draining(target, False)
        await asyncio.gather(*(stream.more(BETWEEN_TOKENS) for stream in streams))
        since_s = time.perf_counter()
        await driver.set_draining(source, True)
        while any(view.num_requests for view in driver.status().workers if view.status.worker_id == source):
            await asyncio.sleep(0.02)
        until_s = time.perf_counter()
        await asyncio.gather(*(stream.more(4) for stream in streams))
        for stream in streams:
            stream.gaps_s.append(max(stream.intervals(since_s, until_s)))
            calm = stream.intervals(since_s - (until_s - since_s), since_s)
            stream.calm_s.append(max(calm, default=0.0))
    usual = [interval for stream in streams for interval in stream.intervals(begun_s)]
    for task in tasks:
        task.cancel()
    ratios = sorted(gap / stream.median_s for stream in streams for gap in stream.switches_s)
    longest = [gap / stream.median_s for stream in streams for gap in stream.gaps_s]
    calm = [gap / stream.median_s for stream in streams for gap in stream.calm_s]
    counters = dict(driver.status().counters)
    return {
        "moves": counters.get("migrations_done", 0.0),
        "interval_s": statistics.median(usual),
        "calm_median": statistics.median(calm),
        "calm_max": max(calm),
        "gap_s": statistics.median([gap for stream in streams for gap in stream.switches_s]),
        "gap_median": statistics.median(ratios),
        "gap_p90": ratios[int(len(ratios) * 0.9)],
        "gap_max": ratios[-1],
        "longest_median": statistics.median(longest),
        "given_up": counters.get("migrations_begun", 0.0) - counters.get("migrations_done", 0.0),
    }


def where(driver: RouterDriver, request_id: str) -> str:
    """The worker whose outputs a request takes now; the router tells nobody, so its books are read."""
    flight = driver._core.flights._flights.get(request_id)
    return flight.worker_id if flight is not None else ""


def table(rows: list[dict[str, Any]]) -> str:
    head = (
        "| model | streams | moves | interval, ms | gap, ms | gap, intervals: median | p90 | max | longest while moving | longest without a move |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    lines = [
        f"| {row['model']} | {row['streams']} | {row['moves']:.0f} | {row['interval_s'] * 1e3:.2f} "
        f"| {row['gap_s'] * 1e3:.2f} | {row['gap_median']:.2f} | {row['gap_p90']:.2f} | {row['gap_max']:.2f} "
        f"| {row['longest_median']:.2f} | {row['calm_median']:.2f} |"
        for row in rows
    ]
    return "\n".join([head, *lines])


def model_folder(kind: str, cache: Path) -> Path:
    if kind == "tiny":
        return TINY
    from model_shapes import SHAPES
    from random_checkpoints import random_checkpoint

    return random_checkpoint(SHAPES[kind], cache)


async def main(args: argparse.Namespace) -> int:
    load = ForeignLoad()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cache = args.cache or Path(folder)
        cache.mkdir(parents=True, exist_ok=True)
        for kind in args.models:
            for num_streams in args.streams:
                rows.append(await measure(kind, model_folder(kind, cache), num_streams, args))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    facts = machine_facts()
    print(
        f"{facts['date']}, {facts['cpu']}, {facts['num_cores']} cores. Other programs took {load.share():.0%} of the cores.\n"
    )
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1))
    is_met = all(row["gap_median"] <= TARGET_INTERVALS for row in rows)
    print(
        f"\nTarget: a gap of at most {TARGET_INTERVALS:g} intervals; the median of every row {'meets' if is_met else 'misses'} it."
    )
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=("tiny", "dense"), default=["tiny", "dense"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8], help="streams that move together")
    parser.add_argument("--rounds", type=int, default=20, help="how often they move")
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens")
    parser.add_argument("--at-once", type=int, default=4, help="router.max_migrations")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--transport", default="shm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="where random checkpoints are kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    given = parse()
    if given.worker:
        asyncio.run(run_worker(*json.loads(given.worker)))
    else:
        sys.exit(asyncio.run(main(given)))
