"""Makes a worker's transports from their names; leaves out what this machine cannot do, and says so. Opens no connection."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from workers.errors import InvalidConfig, TransferFailed
from workers.kv_memory.memory import KvMemory
from workers.kv_memory.native.library import library
from workers.transports.contract import Transport
from workers.transports.cuda_ipc import CudaIpcTransport
from workers.transports.grpc_stream import GrpcTransport
from workers.transports.loopback import LoopbackTransport
from workers.transports.negotiate import BEST_FIRST
from workers.transports.nixl import NixlTransport
from workers.transports.nixl_agent import installed
from workers.transports.shm import ShmTransport
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
                made[name] = TcpTransport(listen_host, timeout_s)
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
