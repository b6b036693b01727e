"""Puts a worker's data path together: its transports, and what they need of the worker's gRPC server."""

from __future__ import annotations

import socket
from collections.abc import Callable

import grpc

from workers.config import WorkerConfig
from workers.kv_memory.memory import KvMemory
from workers.transports.contract import ServedTransport, Transport
from workers.transports.factory import make_transports
from workers.trust.credentials import Credentials

DataPath = Callable[[WorkerConfig, KvMemory, str, grpc.aio.Server, Credentials | None], dict[str, Transport]]
"""What makes the transports of the worker with this id."""


def make_data_path(
    config: WorkerConfig,
    memory: KvMemory,
    worker_id: str,
    server: grpc.aio.Server,
    credentials: Credentials | None = None,
) -> dict[str, Transport]:
    """The transports of config.transports that work here, best first. Call before the server starts."""
    made = make_transports(
        config.transports,
        memory,
        worker_id=worker_id,
        host=socket.gethostname(),
        listen_host=config.host,
        timeout_s=config.transfer_timeout_s,
        cache_folder=config.cache_folder,
        credentials=credentials,
    )
    for transport in made.values():
        if isinstance(transport, ServedTransport):
            server.add_generic_rpc_handlers(transport.handlers())
    return made
