"""What a router costs: CPU per streamed token and per request, added time to the first token, memory of open streams; beside its peers.

python bench/routers.py
python bench/routers.py --routers baton sglang vllm --peers-bin /path/to/venv/bin --json

Each router is a process on a core of its own (`--core`); stand-in workers, the load and this program share the others. Baton's is the
router as it is served, with stand-in workers over gRPC; a peer gets an OpenAI server that streams the same tokens at the same times
(bench/stand_ins.py). CPU is the router process's, all threads. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvloop
from machine_facts import machine_facts
from router_load import Load, chat_body

HERE = Path(__file__).resolve().parent
SHORT = "Tell me of the river that runs through the town where you were born."
LONG = " ".join(f"word{index % 997} and" for index in range(800))
"""About 8 KB."""
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


class Process:
    """A child with its descendants' CPU time; `url` is where it serves."""

    def __init__(
        self,
        command: list[str],
        core: int | None,
        prints_address: bool,
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._log = log.open("wb")
        self.child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if prints_address else self._log,
            stderr=self._log,
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
            start_new_session=True,
            env=os.environ | (environment or {}),
        )
        self.url = ""
        if prints_address:
            assert self.child.stdout is not None
            self.url = self.child.stdout.readline().decode().strip()
            if not self.url:
                raise RuntimeError(f"{command[:3]} did not start: see {log}")

    def cpu_s(self) -> float:
        """Of all its threads, from the scheduler's own account where that is kept."""
        tasks = list(Path(f"/proc/{self.child.pid}/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def rss_bytes(self) -> int:
        return int(Path(f"/proc/{self.child.pid}/statm").read_text().split()[1]) * PAGE

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        self._log.close()


def stand_in(kind: str, options: dict[str, Any], core: int | None, log: Path) -> Process:
    command = [sys.executable, str(HERE / "stand_ins.py"), kind, "--options", json.dumps(options)]
    return Process(command, core, True, log)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- the routers ----


def sglang(binaries: Path, engine: str, port: int) -> list[str]:
    command = [str(binaries / "python"), "-m", "sglang_router.launch_router", "--worker-urls", engine]
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--policy", "cache_aware", "--log-level", "warn"]


def vllm(binaries: Path, engine: str, port: int) -> list[str]:
    command = [str(binaries / "vllm-router"), "--worker-urls", engine, "--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--policy", "cache_aware", "--log-level", "warning"]


PEERS: dict[str, Callable[[Path, str, int], list[str]]] = {"sglang": sglang, "vllm": vllm}


def start_dynamo(binaries: Path, args: argparse.Namespace, interval_s: float, port: int) -> list[Process]:
    """Its front end with the router that knows caches, and a worker that registers in a folder: no etcd and no NATS."""
    log, python = Path(args.logs), str(binaries / "python")
    folder = {"DYN_FILE_KV": tempfile.mkdtemp(prefix="dynamo-"), "DYN_LOG": "warn"}
    worker = [python, str(HERE / "dynamo_worker.py"), str(interval_s), str(HERE.parent / "models" / "ernie-4.5-tiny")]
    planes = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
    front = [python, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port), *planes]
    front += ["--router-mode", "kv", "--kv-cache-block-size", "64"]
    return [
        Process(worker, args.other_core, False, log / "dynamo-worker.log", folder),
        Process(front, args.core, False, log / "dynamo.log", folder),
    ]


NAMES = (*PEERS, "dynamo")


@contextlib.contextmanager
def running(name: str, args: argparse.Namespace, interval_s: float) -> Iterator[tuple[Process, str]]:
    """A router with what stands behind it; its process, and its URL."""
    processes: list[Process] = []
    log = Path(args.logs)
    try:
        if name == "direct":
            processes.append(stand_in("engine", {"interval_s": interval_s}, args.core, log / "direct.log"))
            yield processes[0], processes[0].url
        elif name == "baton":
            options = [{"name": f"worker-{index}", "interval_s": interval_s} for index in range(args.workers)]
            processes += [stand_in("worker", o, args.other_core, log / f"{o['name']}.log") for o in options]
            targets = {"targets": [process.url for process in processes]}
            processes.append(stand_in("router", targets, args.core, log / "baton.log"))
            yield processes[-1], processes[-1].url
        elif name == "dynamo":
            port = free_port()
            processes += start_dynamo(Path(args.dynamo_bin), args, interval_s, port)
            wait_for_port(port, processes[-1])
            wait_for_model(port)
            yield processes[-1], f"http://127.0.0.1:{port}"
        else:
            processes.append(
                stand_in("engine", {"interval_s": interval_s}, args.other_core, log / f"{name}-engine.log")
            )
            port = free_port()
            command = PEERS[name](Path(args.peers_bin), processes[0].url, port)
            processes.append(Process(command, args.core, False, log / f"{name}.log"))
            wait_for_port(port, processes[-1])
            yield processes[-1], f"http://127.0.0.1:{port}"
    finally:
        for process in reversed(processes):
            process.stop()


def wait_for_port(port: int, process: Process) -> None:
    for _ in range(600):
        if process.child.poll() is not None:
            raise RuntimeError("the router ended")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            time.sleep(2.0)  # it looks for its workers
            return
        time.sleep(0.1)
    raise RuntimeError("the router does not listen")


def wait_for_model(port: int) -> None:
    for _ in range(300):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
            if b'"model"' in answer.read():
                return
        time.sleep(0.1)
    raise RuntimeError("the router does not see its worker")


# ---- what is measured ----


async def token_cost(process: Process, url: str, num_streams: int, seconds: float) -> tuple[float, float]:
    """CPU seconds per token of streams that run, and tokens a second."""
    load = Load(url)
    await load.open(num_streams, chat_body(SHORT, 100_000))
    await load.started(num_streams)
    await asyncio.sleep(0.5)
    cpu_s, num_tokens, start_s = process.cpu_s(), load.seen.num_tokens, time.perf_counter()
    await asyncio.sleep(seconds)
    spent_s, num_tokens = process.cpu_s() - cpu_s, load.seen.num_tokens - num_tokens
    rate = num_tokens / (time.perf_counter() - start_s)
    load.close()
    await asyncio.sleep(0.3)
    if load.seen.errors:
        raise AssertionError(load.seen.errors[0])
    return spent_s / max(num_tokens, 1), rate


async def request_cost(process: Process, url: str, prompt: str, seconds: float) -> tuple[float, float]:
    """CPU seconds per request that is answered whole with one token, and requests a second; four connections."""
    load = Load(url)
    await load.open(4, chat_body(prompt, 1, stream=False), is_repeated=True)
    await asyncio.sleep(0.5)
    cpu_s, num_answers, start_s = process.cpu_s(), load.seen.num_answers, time.perf_counter()
    await asyncio.sleep(seconds)
    spent_s, num_answers = process.cpu_s() - cpu_s, load.seen.num_answers - num_answers
    rate = num_answers / (time.perf_counter() - start_s)
    load.close()
    await asyncio.sleep(0.1)
    if load.seen.errors:
        raise AssertionError(load.seen.errors[0])
    return spent_s / max(num_answers, 1), rate


async def first_tokens(url: str, num_streams: int, seconds: float) -> tuple[float, float]:
    """p50 and p99 of the time to the first token, in seconds; each stream sends its next request when the one before has ended."""
    load = Load(url)
    num_tokens = 64 if num_streams > 1 else 4
    await load.open(num_streams, chat_body(SHORT, num_tokens), is_repeated=True, spread_s=min(1.0, num_streams / 50))
    await asyncio.sleep(1.5)
    first = len(load.seen.ttfts_s)
    await asyncio.sleep(seconds)
    ttfts_s = load.seen.ttfts_s[first:]
    load.close()
    await asyncio.sleep(0.3)
    if load.seen.errors:
        raise AssertionError(load.seen.errors[0])
    return statistics.median(ttfts_s), statistics.quantiles(ttfts_s, n=100)[98]


async def open_streams(process: Process, url: str, num_streams: int) -> float:
    """Bytes of memory that each open stream takes."""
    before = process.rss_bytes()
    load = Load(url)
    body = chat_body(SHORT, 100_000)
    for number in range(0, num_streams, 500):
        await load.open(min(500, num_streams - number), body)
        await load.started(number + min(500, num_streams - number), 120.0)
    await asyncio.sleep(1.0)
    grown = process.rss_bytes() - before
    load.close()
    await asyncio.sleep(0.5)
    return grown / num_streams


async def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Everything of one router. Times in seconds, sizes in bytes."""
    found: dict[str, float] = {}
    with running(name, args, args.interval_s) as (process, url):
        found["rss_idle"] = process.rss_bytes()
        for num_streams in args.streams:
            p50, p99 = await first_tokens(url, num_streams, args.seconds)
            found |= {f"ttft_p50_{num_streams}": p50, f"ttft_p99_{num_streams}": p99}
        if name == "direct":
            return found
        found["request_s"], found["requests_per_s"] = await request_cost(process, url, SHORT, args.seconds)
        found["long_request_s"], _ = await request_cost(process, url, LONG, args.seconds)
        found["token_s"], found["tokens_per_s"] = await token_cost(process, url, 64, args.seconds)
    with running(name, args, 0.0) as (process, url):
        found["saturated_token_s"], found["saturated_tokens_per_s"] = await token_cost(process, url, 64, args.seconds)
    if args.open_streams:
        with running(name, args, 3600.0) as (process, url):
            found["stream_bytes"] = await open_streams(process, url, args.open_streams)
    return found


ROWS = (
    ("CPU per token, us (64 streams at their own rate)", "token_s", 1e6),
    ("CPU per token, us (64 streams, as fast as it goes)", "saturated_token_s", 1e6),
    ("tokens a second then", "saturated_tokens_per_s", 1),
    ("CPU per short request, us", "request_s", 1e6),
    ("CPU per request of 8 KB, us", "long_request_s", 1e6),
    ("memory idle, MB", "rss_idle", 1e-6),
    ("memory per open stream, KB", "stream_bytes", 1e-3),
)


def table(found: dict[str, dict[str, float]], streams: list[int]) -> str:
    """Markdown: a row for each figure, with its ratio to Baton's where there are peers."""
    names = [name for name in found if name != "direct"]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]

    def row(title: str, key: str, scale: float, base: float = 0.0, digits: int = 1) -> None:
        cells = []
        own = found.get("baton", {}).get(key)
        for name in names:
            value = found[name].get(key)
            if value is None:
                cells.append("-")
                continue
            ratio = f" ({value / own:.2f})" if own and name != "baton" and not base else ""
            cells.append(f"{(value - base) * scale:.{digits}f}{ratio}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    for title, key, scale in ROWS:
        row(title, key, scale)
    for num_streams in streams:
        for part in ("p50", "p99"):
            key = f"ttft_{part}_{num_streams}"
            base = found.get("direct", {}).get(key, 0.0)
            row(f"added first token {part}, {num_streams} streams, ms", key, 1e3, base or 1e-12, 2)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routers", nargs="+", default=["baton", *NAMES], choices=["baton", *NAMES])
    parser.add_argument("--peers-bin", default=str(Path(sys.executable).parent), help="folder of the peers' programs")
    parser.add_argument("--dynamo-bin", default=str(Path(sys.executable).parent), help="the same, of Dynamo's")
    parser.add_argument("--workers", type=int, default=1, help="of Baton's router")
    parser.add_argument("--interval-s", type=float, default=0.01, help="from one token of a stream to the next")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32, 256], help="at which first tokens are timed")
    parser.add_argument("--open-streams", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--core", type=int, default=0, help="the router's")
    parser.add_argument("--other-core", type=int, default=1)
    parser.add_argument("--logs", default="/tmp", help="folder for what the processes print")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.other_core})
    found: dict[str, dict[str, float]] = {}
    for name in ["direct", *args.routers]:
        try:
            found[name] = uvloop.run(measure(name, args))
        except (FileNotFoundError, RuntimeError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    if args.json:
        print(json.dumps({"machine": machine_facts(), "routers": found}))
    else:
        print(table(found, args.streams))
    return 0


if __name__ == "__main__":
    sys.exit(main())
