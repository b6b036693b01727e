"""What a router's decisions cost, in process and without sockets: arrival, load frame, tick, status, and a token on its way to a client.

python bench/router_core.py
python bench/router_core.py --workers 2 64 --requests 1000 --json
python bench/router_core.py --metrics

Figures are CPU time of one thread. Half of the workers prefill, half decode, and all hold the beginning of the prompt that arrives.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvloop
from machine_facts import machine_facts
from prometheus_client import Histogram
from prometheus_client.exposition import generate_latest

from router.api.app import create_app
from router.api.metrics import Metrics, Tally, write_open_metrics
from router.api.middleware import Draining
from router.api.status_metrics import Snapshot
from router.config import ApiConfig, RouterConfig
from router.core import RouterCore
from router.direct import DIRECT
from router.driver import RouterDriver, make_policy
from router.events import Attach, FrameArrived, RequestArrived, RequestCancelled, SendMessage, Tick, WorkersChanged
from router.tenants.config import TenantsConfig
from router.tenants.tenancy import Tenancy
from workers.kv_cache.block_hash import block_hashes
from workers.pb import worker_pb2 as pb
from workers.request import FinishReason, Output, Request, SamplingParams
from workers.status import KvEvent, Load, ModelInfo, Role, WorkerAddress, WorkerStatus
from workers.text.tokenizer import Tokenizer
from workers.wire.attach import Cancel, DumpRequest, Submit, WorkerFrame
from workers.wire.attach_protobuf import frame_from_pb, frame_to_pb
from workers.wire.streams import Sealer, Unsealer

BLOCK_SIZE = 64
MODEL = ModelInfo("model", "fingerprint", 100_000, 1 << 18, BLOCK_SIZE)
GENERATION = 1 << 32
COUNTERS = tuple((f"counter_{index}", float(index)) for index in range(40))
"""As many as a worker reports."""
ROOM = Load(num_free_blocks=1 << 20, num_blocks=1 << 20)
CHECKPOINT = Path(__file__).resolve().parents[1] / "models" / "ernie-4.5-tiny"


class Fleet:
    """A core with workers that are up and requests that run; `now` does not move by itself."""

    def __init__(self, num_workers: int, num_requests: int, prompt_tokens: int) -> None:
        config = RouterConfig(model="unused", max_running=1 << 20, max_queue=1 << 20, max_prefix_index_blocks=1 << 24)
        self.core = RouterCore(config, make_policy(config))
        self.now = 1.0
        self.shared = tuple(range(prompt_tokens - BLOCK_SIZE))
        hashes = tuple(block_hashes(self.shared, BLOCK_SIZE))
        names = [f"{'prefill' if index % 2 else 'decode'}-{index}" for index in range(num_workers)]
        commands = self.core.handle(WorkersChanged(tuple(WorkerAddress(n, GENERATION, n) for n in names)), self.now)
        self.connections = {c.worker_id: c.connection for c in commands if isinstance(c, Attach)}
        for name in names:
            role = Role.PREFILL if name.startswith("prefill") else Role.DECODE
            status = WorkerStatus(name, GENERATION, role, MODEL, ROOM, counters=COUNTERS)
            self.frame(name, WorkerFrame(GENERATION, kv_events=(KvEvent(1, hashes, reset=True),), status=status))
        self._num_arrived = 0
        self._fill(num_requests)
        while self.core.index.backlog:
            self.core.handle(Tick(), self.now)

    def _fill(self, num_requests: int) -> None:
        """Requests that are in mid-answer; with short prompts, which no cache knows."""
        for _ in range(num_requests):
            _, worker, wire_id = self.arrive((1, 2, self._num_arrived))
            self.frame(worker, WorkerFrame(GENERATION, (Output(wire_id, 0, (7,), "a"),)))

    def frame(self, worker: str, frame: WorkerFrame) -> None:
        self.core.handle(FrameArrived(worker, self.connections[worker], frame), self.now)

    def arrive(self, prompt: tuple[int, ...]) -> tuple[str, str, str]:
        """The request's name, its worker, and its name there."""
        self._num_arrived += 1
        request = Request(f"r{self._num_arrived}", prompt, SamplingParams(max_tokens=256, seed=1))
        for command in self.core.handle(RequestArrived(request), self.now):
            if isinstance(command, SendMessage) and isinstance(command.message, Submit):
                return request.request_id, command.worker_id, command.message.request.request_id
        raise AssertionError("the request was not sent")

    def measure(self) -> dict[str, float]:
        """CPU seconds of each event."""
        times: dict[str, list[float]] = {"arrival_s": []}
        for index in range(5):
            prompt = self.shared + tuple(range(index, index + BLOCK_SIZE))
            arrived: list[str] = []
            times["arrival_s"].append(cpu_s(lambda p=prompt, a=arrived: a.append(self.arrive(p)[0])))  # type: ignore[misc]
            self.core.handle(RequestCancelled(arrived[0]), self.now)
        times["hashing_s"] = [cpu_s(lambda: block_hashes(self.shared, BLOCK_SIZE)) for _ in range(5)]
        decode = next(iter(self.connections))
        steps = [(0.01 + n / 1e5, n % 60, 3000 * (n % 60), 512 * (n % 3), 1 << 20) for n in range(200)]
        loads = [Load(0, n % 7, 0, 0, 1 << 20, 1 << 20, *steps[n]) for n in range(200)]
        frames = [FrameArrived(decode, self.connections[decode], WorkerFrame(GENERATION, load=load)) for load in loads]
        times["load_frame_s"] = [cpu_s(lambda f=frame: self.core.handle(f, self.now)) for frame in frames]  # type: ignore[misc]
        times["tick_s"] = []
        for n in range(5):  # each worker has reported a step since the tick before
            load = Load(0, 1, 0, 0, 1 << 20, 1 << 20, *steps[n])
            for name in self.connections:
                self.frame(name, WorkerFrame(GENERATION, load=load))
            times["tick_s"].append(cpu_s(lambda: self.core.handle(Tick(), self.now)))
        for name in self.connections:
            self.frame(name, WorkerFrame(GENERATION, load=ROOM))
        driver = RouterDriver(RouterConfig(model="unused"), "router-0", Client())
        driver._core = self.core
        times["status_s"] = [cpu_s(driver.status) for _ in range(3)]
        return {name: statistics.median(values) for name, values in times.items()}

    def measure_metrics(self) -> dict[str, float]:
        """CPU seconds of a scrape: of the router's thread, and of the one that writes; its bytes and lines."""
        driver = RouterDriver(RouterConfig(model="unused"), "router-0", Client())
        driver._core = self.core
        metrics = Metrics(driver)
        status = driver.status()
        found = {"status_s": statistics.median(cpu_s(driver.status) for _ in range(3))}
        for name, write in (("text", generate_latest), ("open", write_open_metrics)):
            written = [b""]

            def scrape(write: Callable[[Any], bytes] = write, written: list[bytes] = written) -> None:
                written[0] = write(Snapshot(metrics.registry, status, driver.role_report()))

            found[f"{name}_s"] = statistics.median(cpu_s(scrape) for _ in range(3))
            found[f"{name}_bytes"] = len(written[0])
            found[f"{name}_lines"] = written[0].count(b"\n")
        return found


class Link:
    """A stream of frames as bytes, such as gRPC brings; what goes down is kept."""

    def __init__(self) -> None:
        self._next: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._sealer = Sealer()
        self.submitted: list[str] = []

    def sealed(self, frame: WorkerFrame) -> bytes:
        written: bytes = self._sealer.seal(frame_to_pb(frame)).SerializeToString()
        return written

    def put(self, written: bytes) -> None:
        """For a link that waits for its next frame."""
        self._next.set_result(written)

    async def frames(self) -> AsyncIterator[WorkerFrame]:
        unsealer = Unsealer()
        while True:
            message = pb.WorkerFrame.FromString(await self._next)
            self._next = asyncio.get_running_loop().create_future()
            unsealer.check(message)
            yield frame_from_pb(message)

    def send(self, message: Submit | Cancel | DumpRequest) -> bool:
        if isinstance(message, Submit):
            self.submitted.append(message.request.request_id)
        return True

    async def finish(self) -> None:
        pass

    async def close(self) -> None:
        pass


class Client:
    """A WorkerClient whose workers are this program."""

    def __init__(self) -> None:
        self.links: list[Link] = []

    def attach(self, worker: WorkerAddress, router_id: str) -> Link:
        self.links.append(Link())
        return self.links[-1]

    set_role = set_draining = describe = None  # type: ignore[assignment]


async def token_s(num_streams: int, num_steps: int) -> float:
    """CPU seconds a token takes from a frame's bytes to the bytes of a server-sent event; `num_streams` tokens a frame."""
    client = Client()
    driver = RouterDriver(RouterConfig(model="unused", tick_s=60.0), "router-0", client)  # type: ignore[arg-type]
    await driver.start()
    driver.set_workers([WorkerAddress("decode-0", GENERATION, "h:1")])
    await settle()
    (link,) = client.links
    status = WorkerStatus("decode-0", GENERATION, Role.MIXED, MODEL, ROOM)
    link.put(link.sealed(WorkerFrame(GENERATION, status=status)))
    await settle()
    tenancy = Tenancy(TenantsConfig())
    app = create_app(driver, Tokenizer.load(str(CHECKPOINT)), ApiConfig(), Draining(), tenancy)
    body = b'{"messages":[{"role":"user","content":"hi"}],"stream":true,"max_tokens":4096}'
    frames: list[bytes] = []
    sent = num_steps_sent = 0

    def count(body: bytes) -> None:
        """One step at a time, as workers send them: the next frame comes when all of this one's events are on their way."""
        nonlocal sent, num_steps_sent
        if b"data: {" in body:
            sent += 1
            if sent % num_streams == 0 and num_steps_sent < num_steps:
                link.put(frames[num_steps_sent])
                num_steps_sent += 1

    class Writer:
        """A connection that takes everything at once."""

        is_open = True
        write = staticmethod(count)

    async def one() -> None:
        came = [{"type": "http.request", "body": body}]
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]

        async def receive() -> Any:
            return came.pop() if came else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            count(message.get("body", b""))

        address = {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "scheme": "http", "http_version": "1.1"}
        way = {"method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"", "root_path": ""}
        offered = {"extensions": {DIRECT: Writer()}, "asgi": {"version": "3.0"}}
        await app({"type": "http", "headers": headers, **address, **way, **offered}, receive, send)

    tasks = [asyncio.create_task(one()) for _ in range(num_streams)]
    while len(link.submitted) < num_streams:
        await settle()
        for task in tasks:
            if task.done():  # it never is, before its first token
                task.result()
                raise AssertionError("an answer has ended before it began")
    for position in range(num_steps):
        reason = FinishReason.LENGTH if position == num_steps - 1 else None
        outputs = [Output(name, position, (1234,), " word", finish_reason=reason) for name in link.submitted]
        load = Load(num_running=num_streams, num_free_blocks=1 << 20, num_blocks=1 << 20)
        frames.append(link.sealed(WorkerFrame(GENERATION, tuple(outputs), load)))
    start_s = time.thread_time()
    num_steps_sent = 1
    link.put(frames[0])
    await asyncio.gather(*tasks)
    spent_s = time.thread_time() - start_s
    await driver.stop()
    if sent != num_streams * num_steps:
        raise AssertionError(f"{sent} events for {num_streams * num_steps} tokens")
    return spent_s / (num_streams * num_steps)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def cpu_s(work: Callable[[], object]) -> float:
    start_s = time.thread_time()
    work()
    return time.thread_time() - start_s


def wire_s(num_outputs: int) -> tuple[float, float]:
    """CPU seconds to read a frame's bytes into values: parsing, and making the values."""
    outputs = [Output(f"0123456789abcdef-{index}#1", 17, (1234,), " word") for index in range(num_outputs)]
    written = frame_to_pb(WorkerFrame(GENERATION, tuple(outputs), Load(1, 2, 3, 4, 5, 6, 0.02))).SerializeToString()
    message = pb.WorkerFrame.FromString(written)
    parse = statistics.median(cpu_s(lambda: pb.WorkerFrame.FromString(written)) for _ in range(500))
    return parse, statistics.median(cpu_s(lambda: frame_from_pb(message)) for _ in range(500))


def observe_s(num: int = 100_000) -> dict[str, float]:
    """CPU seconds to count one value in a histogram: of each token's and of each request's, without and with an example."""
    buckets = tuple(0.001 * 2**n for n in range(18))
    values = [0.0005 * (n % 5000) for n in range(num)]
    found = {}
    for name, histogram in (
        ("token", Tally("a", "a", buckets)),
        ("request", Histogram("b", "b", buckets=buckets, registry=None)),
    ):
        for kind, exemplar in (("plain", None), ("exemplar", {"trace_id": "a" * 32})):

            def observe(histogram: Any = histogram, exemplar: dict[str, str] | None = exemplar) -> None:
                for value in values:
                    histogram.observe(value, exemplar)

            found[f"{name}_{kind}"] = cpu_s(observe) / num
    return found


def show_metrics(workers: list[int], as_json: bool) -> None:
    rows = [{"workers": count} | Fleet(count, 0, 2 << 10).measure_metrics() for count in workers]
    spent = observe_s()
    if as_json:
        print(json.dumps({"machine": machine_facts(), "metrics": rows, "observe_s": spent}))
        return
    print("| workers | snapshot, ms | written as text, ms | bytes | lines | as OpenMetrics, ms | bytes |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['workers']} | {row['status_s'] * 1e3:.2f} | {row['text_s'] * 1e3:.1f} | {row['text_bytes']} "
            f"| {row['text_lines']} | {row['open_s'] * 1e3:.1f} | {row['open_bytes']} |"
        )
    print("\n| a value counted, us | without example | with one |\n|---|---:|---:|")
    for name in ("token", "request"):
        print(f"| of a {name} | {spent[f'{name}_plain'] * 1e6:.2f} | {spent[f'{name}_exemplar'] * 1e6:.2f} |")


COLUMNS = ("arrival_s", "hashing_s", "load_frame_s", "tick_s", "status_s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 64, 1000])
    parser.add_argument("--requests", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--prompts", type=int, nargs="+", default=[2 << 10, 128 << 10], help="in tokens")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--metrics", action="store_true", help="measure what /metrics costs instead")
    args = parser.parse_args()
    if args.metrics:
        show_metrics(args.workers, args.json)
        return 0
    rows: list[dict[str, Any]] = []
    for num_workers in args.workers:
        for num_requests in args.requests:
            for prompt_tokens in args.prompts:
                row = {"workers": num_workers, "requests": num_requests, "prompt": prompt_tokens}
                rows.append(row | Fleet(num_workers, num_requests, prompt_tokens).measure())
                print(f"{len(rows)} measured", end="\r", file=sys.stderr)
    tokens = {n: uvloop.run(token_s(n, 4000 // n)) for n in (1, 64)}
    wire = {n: wire_s(n) for n in (0, 1, 64)}
    result = {"machine": machine_facts(), "events": rows, "token_s": tokens, "wire_s": wire}
    if args.json:
        print(json.dumps(result))
        return 0
    print("| workers | requests | prompt | arrival, ms | of it hashing, ms | load frame, us | tick, ms | status, ms |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        arrival, hashing, frame, tick, status = (row[name] for name in COLUMNS)
        print(
            f"| {row['workers']} | {row['requests']} | {row['prompt']} | {arrival * 1e3:.2f} | {hashing * 1e3:.2f} "
            f"| {frame * 1e6:.1f} | {tick * 1e3:.2f} | {status * 1e3:.2f} |"
        )
    print("\n| streams a frame | a token, frame bytes to SSE bytes, us |\n|---:|---:|")
    for num_streams, spent_s in tokens.items():
        print(f"| {num_streams} | {spent_s * 1e6:.1f} |")
    print("\n| outputs | parse a frame, us | to values, us |\n|---:|---:|---:|")
    for num_outputs, (parse, values) in wire.items():
        print(f"| {num_outputs} | {parse * 1e6:.1f} | {values * 1e6:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
