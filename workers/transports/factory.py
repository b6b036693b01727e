"""Makes a worker's transports from their names; leaves out what this machine cannot do, and says so. Opens no connection."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from workers.config import BEST_FIRST, WorkerConfig
from workers.errors import InvalidConfig, TransferFailed
from workers.kv_memory.checksum import library
from workers.kv_memory.memory import KvMemory
from workers.transports.contract import ServedTransport, Transport
from workers.transports.cuda_ipc import CudaIpcTransport
from workers.transports.grpc_stream import GrpcTransport
from workers.transports.nixl import NixlTransport
from workers.transports.nixl_agent import installed
from workers.transports.same_host import LoopbackTransport, ShmTransport
from workers.transports.tcp import TcpTransport
from workers.trust.credentials import Credentials

log = logging.getLogger(__name__)


def make_transports(
    names: Sequence[str],
    memory: KvMemory,
    *,
    worker_id: str,
    host: str,
    listen_host: str,
    timeout_s: float,
    cache_folder: str = "",
    credentials: Credentials | None = None,
    seals: bool = False,
) -> dict[str, Transport]:
    """{name: transport} in the order of `names`, for one worker process; close each when the worker stops.

    `host` names this host to peers (equal names may share memory); `listen_host` is the address that peers reach, as
    in the worker's own `target`; `timeout_s` bounds each wait without progress; compiled checksums are kept in
    `cache_folder` (~/.cache/baton when empty), and compiled here, about two seconds once for a machine. Call on the
    event loop, before anything waits for it. Raises InvalidConfig for a name that nobody knows.
    """
    library(Path(cache_folder) if cache_folder else None)
    made: dict[str, Transport] = {}
    for name in names:
        match name:
            case "loopback":
                made[name] = LoopbackTransport(memory, worker_id)
            case "shm":
                made[name] = ShmTransport(memory, host)
            case "tcp":
                made[name] = TcpTransport(listen_host, timeout_s, seals=seals)
            case "gloo":
                from workers.transports.collective import GlooTransport  # torch takes seconds to import

                made[name] = GlooTransport(memory, listen_host, timeout_s)
            case "nccl" | "cuda_ipc" if not memory.device_address:
                log.info("%s is left out: the KV pool is not on a GPU", name)
            case "nccl":
                from workers.transports.nccl import NcclTransport

                made[name] = NcclTransport(memory, listen_host, timeout_s)
            case "nixl" if installed() is None:
                log.info("nixl is left out: it is not installed (pip install 'baton-serve[nixl]')")
            case "nixl":
                try:
                    made[name] = NixlTransport(memory, timeout_s)
                except TransferFailed as error:
                    log.warning("nixl is left out: %s", error)
            case "cuda_ipc":
                made[name] = CudaIpcTransport(memory, host)
            case "grpc":
                made[name] = GrpcTransport(timeout_s, credentials=credentials)
            case _:
                raise InvalidConfig(f"no KV transport is called {name!r}: choose from {', '.join(BEST_FIRST)}")
    return made


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
        seals=credentials is not None and config.kv_encryption == "auto",
    )
    for transport in made.values():
        if isinstance(transport, ServedTransport):
            server.add_generic_rpc_handlers(transport.handlers())
    return made
