"""What one streamed chunk costs in each HTTP protocol: the CPU time of `send` alone, without sockets and without an app.

python bench/http_protocols.py [--chunks 200000]
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from router.config import HttpConfig
from router.http_protocol import BoundedProtocol

REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
CHUNK = b'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" the"}}]}\n\n'


class Sink(asyncio.Transport):
    """Takes everything at once."""

    num_bytes = 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("sockname", "peername") else default

    def write(self, data: Any) -> None:
        self.num_bytes += len(data)

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


async def cost_of(kind: Any, num_chunks: int) -> tuple[float, float]:
    """Microseconds of CPU time for a chunk, and for a whole short request."""
    spent = 0.0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal spent
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        start = time.thread_time()
        for _ in range(num_chunks):
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
        spent = time.thread_time() - start
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def short(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})

    async def run(application: Any, num_requests: int) -> float:
        config = Config(application, access_log=False, lifespan="off", log_level="error", timeout_keep_alive=120)
        config.load()
        config.loaded_app = application
        protocol = kind(config=config, server_state=ServerState(), app_state={})
        protocol.connection_made(Sink())
        start = time.thread_time()
        for _ in range(num_requests):
            protocol.data_received(REQUEST)
            while protocol.tasks:
                await asyncio.sleep(0)
        took = time.thread_time() - start
        protocol.connection_lost(None)
        return took

    await run(app, 1)
    num_requests = max(1, num_chunks // 20)
    return spent / num_chunks * 1e6, await run(short, num_requests) / num_requests * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=200_000)
    num_chunks = parser.parse_args().chunks

    def bounded(**options: Any) -> BoundedProtocol:
        return BoundedProtocol(HttpConfig(), lambda reason: None, **options)

    print("| protocol | us a chunk | us a request |\n|---|---|---|")
    for name, kind in (("httptools", HttpToolsProtocol), ("httptools, bounded", bounded), ("h11", H11Protocol)):
        best = [min(each) for each in zip(*(asyncio.run(cost_of(kind, num_chunks)) for _ in range(3)), strict=True)]
        print(f"| {name} | {best[0]:.2f} | {best[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
