"""Connects to a Ray that runs already, on this host or elsewhere."""

from __future__ import annotations

import logging
import socket
from contextlib import nullcontext
from typing import Any

from cluster.ray_session import running
from cluster.ray_session.auth import given_token, presented
from cluster.ray_session.defaults import job_config, loopback_only, own_address, quiet, set_environment
from cluster.ray_session.local import LOOPBACK, RayFailed, RaySession

_ADVICE = "is it running there (`ray status`), and is --ray-address right?"


def join_ray(address: str, namespace: str, token_file: str = "") -> RaySession:
    """Connects to the Ray at `address` (HOST:PORT, or "auto": the one of this host) with the token in the file, or else in the
    operator's environment, or else of this user's cluster that has the address. Raises RayFailed.
    """
    set_environment()
    address, token = _find(address, token_file or given_token())
    host, port = _probe(address)
    import ray

    quiet()
    try:
        with presented(token), loopback_only() if _listens_on_loopback_only(host, port) else nullcontext():
            context: Any = ray.init(
                address=address,
                namespace=namespace,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                job_config=job_config(),
            )
    except ray.exceptions.AuthenticationError as error:
        raise RayFailed(
            f"Ray at {address} asks for another token; name the file that holds it (--set ray.token_file=PATH, or "
            "RAY_AUTH_TOKEN_PATH): `baton serve` says where its own is"
        ) from error
    except Exception as error:  # Ray raises many kinds here
        raise RayFailed(f"cannot join Ray at {address}: {' '.join(str(error).split())[:300]}; {_ADVICE}") from error
    url, info = context.dashboard_url, context.address_info
    return RaySession(info["address"], f"http://{url}" if url else "", info["node_ip_address"], token_file=token)


def _find(address: str, token: str) -> tuple[str, str]:
    """Address and token file of the Ray that is meant; raises RayFailed when "auto" could be several."""
    if address == "auto":
        found = running.clusters()
        if len(found) > 1:
            choice = ", ".join(each.ray_address for each in found)
            raise RayFailed(f"several clusters run on this host; choose one with --ray-address: {choice}")
        address = found[0].ray_address if found else address
    known = None if token or address == "auto" else running.with_ray(address)
    return address, token or (known.token_file if known else "")


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
