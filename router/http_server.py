"""Puts an ASGI app behind bounded HTTP connections; knows nothing of what the app does."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import uvicorn

from router.config import HttpConfig
from router.http_protocol import BoundedProtocol


class HttpServer(uvicorn.Server):
    """uvicorn, saying when it listens. `keepalive_s`: for how long an idle connection is kept."""

    def __init__(
        self,
        app: Any,
        config: HttpConfig,
        keepalive_s: float,
        on_started: Callable[[], None],
        on_refused: Callable[[str], None],
        last_words_s: int | None = None,
        tls: ssl.SSLContext | None = None,
        unix: socket.socket | None = None,
    ) -> None:
        """`on_refused` hears why a connection was closed. `last_words_s`: how long clients may take to read what ends their
        answers when the server stops. `tls`: HTTPS is served. `unix`: a bound Unix socket that HTTP is served on besides."""
        super().__init__(
            uvicorn.Config(
                app,
                host="127.0.0.1",
                port=0,
                http=partial(BoundedProtocol, config, on_refused),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=keepalive_s,  # type: ignore[arg-type]  # it takes parts of seconds too
                timeout_graceful_shutdown=last_words_s,
            )
        )
        self._on_started = on_started
        self._tls = tls
        self._unix = unix

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.ssl = self._tls
        await super().startup(sockets=sockets)
        if self._unix is not None:
            loop = asyncio.get_running_loop()
            make = cast(Any, self.config.http_protocol_class)
            state = {"server_state": self.server_state, "app_state": self.lifespan.state}
            self.servers.append(
                await loop.create_unix_server(partial(make, config=self.config, **state), sock=self._unix)
            )
        self._on_started()
