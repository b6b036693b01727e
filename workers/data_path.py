"""Builds the transports that a worker may use, best first; the only place that knows them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import grpc

from workers.config import WorkerConfig
from workers.kv_transfer.memory import KvMemory
from workers.kv_transfer.transport import Transport
from workers.kv_transfer.transports.loopback import LoopbackTransport
from workers.kv_transfer.transports.shm import ShmTransport
from workers.rpc_fetch import RpcFetchTransport


@dataclass(frozen=True, slots=True)
class DataPath:
    """`by_name` is best first. `handlers` are to be registered with the worker's gRPC server."""

    by_name: Mapping[str, Transport]
    handlers: tuple[grpc.GenericRpcHandler, ...] = ()


def make_data_path(config: WorkerConfig, memory: KvMemory, worker_id: str, host: str) -> DataPath:
    """The transports of config.transports, in that order."""
    transports: dict[str, Transport] = {}
    handlers: list[grpc.GenericRpcHandler] = []
    for name in dict.fromkeys(config.transports):
        match name:
            case "loopback":
                transports[name] = LoopbackTransport(memory, worker_id)
            case "shm":
                transports[name] = ShmTransport(memory, host)
            case "grpc":
                fetch = RpcFetchTransport(memory)
                transports[name] = fetch
                handlers.append(fetch.handler)
    return DataPath(transports, tuple(handlers))
