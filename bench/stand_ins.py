"""Processes that stand around a router which is measured: workers without a model, an OpenAI server without one, and Baton's own router.

python bench/stand_ins.py worker|engine|router --options JSON

Each prints one line, the address where it serves, and ends with its standard input. A step gives each running request one token;
`interval_s` is from one step to the next, 0: as fast as it is taken. A request's first token comes at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import grpc.aio
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from router.config import ApiConfig, HttpConfig, RouterConfig
from router.server import RouterServer
from workers.pb import worker_pb2 as pb
from workers.pb import worker_pb2_grpc
from workers.status import Load, ModelInfo, Role, WorkerAddress, WorkerStatus
from workers.wire import attach_protobuf
from workers.wire.streams import SERVER, Sealer

CHECKPOINT = Path(__file__).resolve().parents[1] / "models" / "ernie-4.5-tiny"
TOKEN, TEXT = 1234, " word"
GENERATION = 1 << 32
MODEL = ModelInfo("model", "fingerprint", 100_000, 1 << 17, 64)
ROOM = Load(num_free_blocks=1 << 20, num_blocks=1 << 20)
TURN_S = 0.0005
"""Between two steps that are as fast as they are taken: the loop has others to serve."""


class Running:
    """A request that gets tokens."""

    __slots__ = ("name", "num_left", "position")

    def __init__(self, name: str, num_tokens: int) -> None:
        self.name, self.num_left, self.position = name, num_tokens, 0

    def next(self) -> pb.Output:
        """Its next token."""
        output = pb.Output(request_id=self.name, position=self.position, token_ids=(TOKEN,), text=TEXT)
        self.position += 1
        self.num_left -= 1
        if not self.num_left:
            output.finish_reason = "length"
        return output


class StandInWorker(worker_pb2_grpc.WorkerServicer):
    """A worker for the router that attaches: real messages over real gRPC."""

    def __init__(self, name: str, interval_s: float) -> None:
        self._name = name
        self._interval_s = interval_s

    async def Attach(self, messages: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        running: dict[str, Running] = {}
        fresh: list[Running] = []
        has_fresh = asyncio.Event()
        reader = asyncio.create_task(self._read(messages, running, fresh, has_fresh))
        seal = Sealer().seal
        loop = asyncio.get_running_loop()
        status = WorkerStatus(self._name, GENERATION, Role.MIXED, MODEL, ROOM, max_num_seqs=1 << 16)
        message = attach_protobuf.status_to_pb(status)
        yield seal(pb.WorkerFrame(generation=GENERATION, status=message))
        status_s, step_s = loop.time() + 1, loop.time() + self._interval_s
        try:
            while not reader.done():
                wait_s = max(step_s - loop.time(), 0.0) if self._interval_s or not running else TURN_S
                try:
                    async with asyncio.timeout(max(wait_s, TURN_S) if running else 0.2):
                        await has_fresh.wait()
                except TimeoutError:
                    pass
                frame = pb.WorkerFrame(generation=GENERATION)
                if has_fresh.is_set():
                    has_fresh.clear()
                    frame.outputs.extend([request.next() for request in fresh])
                    running.update((request.name, request) for request in fresh if request.num_left)
                    fresh.clear()
                elif running and loop.time() >= step_s:
                    step_s = max(step_s + self._interval_s, loop.time() - 0.1)
                    frame.outputs.extend([request.next() for request in running.values()])
                    for name in [name for name, request in running.items() if not request.num_left]:
                        del running[name]
                elif not running:
                    step_s = loop.time() + self._interval_s
                if frame.outputs:
                    frame.load.num_running, frame.load.num_free_blocks = len(running), 1 << 20
                    frame.load.num_blocks = 1 << 20
                if loop.time() >= status_s:
                    status_s += 1
                    frame.status.CopyFrom(message)
                    frame.status.load.num_running = len(running)
                if frame.outputs or frame.HasField("status"):
                    yield seal(frame)
        finally:
            reader.cancel()

    async def _read(
        self, messages: AsyncIterator[Any], running: dict[str, Running], fresh: list[Running], has_fresh: asyncio.Event
    ) -> None:
        async for message in messages:
            if message.HasField("submit"):
                request = message.submit.request
                fresh.append(Running(request.request_id, request.params.max_tokens))
                has_fresh.set()
            elif message.HasField("cancel"):
                running.pop(message.cancel.request_id, None)


async def serve_worker(options: dict[str, Any]) -> str:
    server = grpc.aio.server(options=SERVER)
    worker = StandInWorker(options["name"], options["interval_s"])
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    KEPT.append(server)
    return f"127.0.0.1:{port}"


# ---- an OpenAI server ----

CHUNK = (
    'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1700000000,"model":"model",'
    '"choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":%s}]}\n\n'
)
WHOLE = (
    b'{"id":"chatcmpl-0","object":"chat.completion","created":1700000000,"model":"model","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":" word"},"finish_reason":"length"}],"usage":{"prompt_tokens":9,"completion_tokens":1,'
    b'"total_tokens":10}}'
)
OTHERS = b'{"object":"list","data":[{"id":"model","object":"model"}],"model_path":"model","status":"ready"}'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\n%s\r\n\r\n"
EVENTS = HEAD % (b"text/event-stream", b"transfer-encoding: chunked")


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


MIDDLE, LAST = (chunked((CHUNK % reason).encode()) for reason in ("null", '"length"'))
END = chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class StandInEngine(asyncio.Protocol):
    """One connection. Answers completions with tokens, and whatever else is asked with a list of its one model."""

    streams: ClassVar[set[StandInEngine]] = set()

    def __init__(self) -> None:
        self._got = bytearray()
        self._num_left = 0
        self._is_paused = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.streams.discard(self)

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False

    def data_received(self, data: bytes) -> None:
        self._got += data
        while (at := self._got.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._got[:at]).lower()
            length = 0
            for line in head.split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    length = int(line[15:])
            if len(self._got) < at + 4 + length:
                return
            body = bytes(self._got[at + 4 : at + 4 + length])
            del self._got[: at + 4 + length]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if b"completions" not in head.split(b"\r\n", 1)[0]:
            self._whole(OTHERS)
            return
        asked = json.loads(body)
        if not asked.get("stream"):
            self._whole(WHOLE)
            return
        self._num_left = asked.get("max_tokens") or asked.get("max_completion_tokens") or 16
        self._transport.write(EVENTS)
        self.streams.add(self)
        self.step()

    def _whole(self, body: bytes) -> None:
        length = b"content-length: %d" % len(body)
        self._transport.write(HEAD % (b"application/json", length) + body)

    def step(self) -> None:
        """One token more."""
        if self._is_paused:
            return
        self._num_left -= 1
        if self._num_left:
            self._transport.write(MIDDLE)
            return
        self.streams.discard(self)
        self._transport.write(LAST + END)


async def serve_engine(options: dict[str, Any]) -> str:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(StandInEngine, "127.0.0.1", 0, backlog=4096)
    KEPT.append(asyncio.create_task(step_engine(options["interval_s"])))
    KEPT.append(server)
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def step_engine(interval_s: float) -> None:
    loop = asyncio.get_running_loop()
    step_s = loop.time()
    while True:
        step_s = max(step_s + interval_s, loop.time() - 0.1)
        await asyncio.sleep(max(step_s - loop.time(), TURN_S if not interval_s else 0.0))
        for stream in tuple(StandInEngine.streams):
            stream.step()


# ---- Baton's router ----


async def serve_router(options: dict[str, Any]) -> str:
    config = RouterConfig(
        model=str(CHECKPOINT),
        port=0,
        max_running=1 << 16,
        max_queue=1 << 16,
        worker_backlog=1 << 16,
        prefill_backlog_tokens=1 << 30,
        request_timeout_s=3600.0,
        http=HttpConfig(max_connections=1 << 16),
        api=ApiConfig(heartbeat_s=3600.0),
    )
    server = RouterServer(config, "router-0")
    url = await server.start()
    addresses = [
        WorkerAddress(f"worker-{index}", GENERATION, target) for index, target in enumerate(options["targets"])
    ]
    server.set_workers(tuple(addresses))
    while not (await asyncio.to_thread(server.status)).workers:
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    KEPT.append(server)
    return url


KEPT: list[Any] = []
"""What serves, for as long as the process lives."""
KINDS = {"worker": serve_worker, "engine": serve_engine, "router": serve_router}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--options", type=json.loads, default={})
    args = parser.parse_args()
    print(await KINDS[args.kind](args.options), flush=True)
    over = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait_for_end() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(over.set)

    threading.Thread(target=wait_for_end, daemon=True).start()
    await over.wait()


if __name__ == "__main__":
    uvloop.run(main())
    sys.stdout.flush()
    sys.exit(0)
