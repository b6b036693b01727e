"""Connects to a Ray that runs already, on this host or elsewhere."""

from __future__ import annotations

import logging
import socket
from contextlib import nullcontext
from typing import Any

from cluster.ray_session.defaults import job_config, loopback_only, own_address, quiet, set_environment
from cluster.ray_session.local import LOOPBACK, RayFailed, RaySession

_ADVICE = "is it running there (`ray status`), and is --ray-address right?"


def join_ray(address: str, namespace: str) -> RaySession:
    """Connects to the Ray at `address` (HOST:PORT, or "auto": the one of this host). Raises RayFailed."""
    set_environment(joins=True)
    host, port = _probe(address)
    import ray

    quiet()
    try:
        with loopback_only() if _listens_on_loopback_only(host, port) else nullcontext():
            context: Any = ray.init(
                address=address,
                namespace=namespace,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                job_config=job_config(),
            )
    except Exception as error:  # Ray raises many kinds here
        raise RayFailed(f"cannot join Ray at {address}: {' '.join(str(error).split())[:300]}; {_ADVICE}") from error
    url, info = context.dashboard_url, context.address_info
    return RaySession(info["address"], f"http://{url}" if url else "", info["node_ip_address"])


def _probe(address: str) -> tuple[str, int]:
    """Host and port of a Ray that listens; ("", 0) for "auto". Raises RayFailed at once, where Ray tries for minutes."""
    if address == "auto":
        return "", 0
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise RayFailed(f"the address of a Ray is auto or HOST:PORT; it is {address!r} (--ray-address)")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except (OSError, OverflowError) as error:
        raise RayFailed(
            f"no Ray listens at {address} ({getattr(error, 'strerror', None) or error}); {_ADVICE}"
        ) from error
    return host, int(port)


def _listens_on_loopback_only(host: str, port: int) -> bool:
    """Whether the Ray is one that `start_ray` has started: nobody answers at this host's outer address."""
    if not host:
        return True  # "auto" finds the address that the Ray itself goes by
    if host not in (LOOPBACK, "localhost"):
        return False
    try:
        socket.create_connection((own_address(), port), timeout=1.0).close()
    except OSError:
        return True
    return False
