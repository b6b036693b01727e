"""Makes a worker's transports from their names; leaves out what this machine cannot do, and says so. Opens no connection."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from workers.errors import InvalidConfig
from workers.kv_transfer.memory import KvMemory
from workers.kv_transfer.transport import Transport
from workers.kv_transfer.transports.grpc_stream import GrpcTransport
from workers.kv_transfer.transports.loopback import LoopbackTransport
from workers.kv_transfer.transports.negotiate import BEST_FIRST
from workers.kv_transfer.transports.shm import ShmTransport
from workers.kv_transfer.transports.tcp import TcpTransport

log = logging.getLogger(__name__)


def make_transports(
    names: Sequence[str], memory: KvMemory, *, worker_id: str, host: str, listen_host: str, timeout_s: float
) -> dict[str, Transport]:
    """{name: transport} in the order of `names`, for one worker process; close each when the worker stops.

    `host` names this host to peers (equal names may share memory); `listen_host` is the address that peers reach, as
    in the worker's own `target`; `timeout_s` bounds each wait without progress. Call on the event loop. Raises
    InvalidConfig for a name that nobody knows.
    """
    made: dict[str, Transport] = {}
    for name in names:
        match name:
            case "loopback":
                made[name] = LoopbackTransport(memory, worker_id)
            case "shm":
                made[name] = ShmTransport(memory, host)
            case "tcp":
                made[name] = TcpTransport(listen_host, timeout_s)
            case "grpc":
                made[name] = GrpcTransport(timeout_s)
            case _:
                raise InvalidConfig(f"no KV transport is called {name!r}: choose from {', '.join(BEST_FIRST)}")
    return made
