"""Opens gRPC channels and ports, with certificates or without: nothing else in Baton does. Settings are those of grpc_options.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from workers.errors import InvalidConfig
from workers.trust.credentials import Credentials
from workers.trust.gate import Gate
from workers.trust.parties import Party


def open_channel(
    target: str, options: Sequence[tuple[str, Any]], credentials: Credentials | None, peer: Party
) -> grpc.aio.Channel:
    """A channel to host:port, where whoever answers must show the certificate of `peer`; without `credentials`, anybody."""
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    named = (*options, ("grpc.ssl_target_name_override", peer.dns_name))
    return grpc.aio.secure_channel(target, credentials.channel(), options=named)


def make_server(options: Sequence[tuple[str, Any]], credentials: Credentials | None) -> grpc.aio.Server:
    """A server that asks the rules before every call, where there are certificates."""
    interceptors = [] if credentials is None else [Gate()]
    return grpc.aio.server(interceptors=interceptors, options=options)


def bind(server: grpc.aio.Server, host: str, port: int, credentials: Credentials | None) -> int:
    """The port that the server listens on; 0 asks for any. Raises InvalidConfig when it is taken."""
    address = f"{host}:{port}"
    try:
        if credentials is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials.server())
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise InvalidConfig(f"port {port} on {host} is in use: set worker.port to a free one, or to 0")
    return int(bound)
