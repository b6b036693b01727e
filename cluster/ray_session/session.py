"""Starts Ray on this host and ends all of it again, or joins one that runs already. Knows nothing of workers and routers."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from cluster.config import RayConfig
from cluster.ray_session import processes, running
from cluster.ray_session.auth import given_token, presented
from cluster.ray_session.defaults import job_config, loopback_only, own_address, quiet, set_environment
from cluster.ray_session.folders import end_local, ray_folder, scratch_folder, token_file
from workers.errors import BatonError

LOOPBACK = "127.0.0.1"


class RayFailed(BatonError):
    """The world's fault: Ray did not start, or there is none to join."""


@dataclass(slots=True)
class RaySession:
    """A connection to Ray. When Ray was started for it, `folder` holds its files and `stop` ends its processes.

    `token_file` holds the token that this Ray asks for; empty: the operator's own place, or it asks for none.
    """

    address: str
    dashboard_url: str
    node_ip: str = LOOPBACK
    folder: str = ""
    token_file: str = ""
    _ended: bool = field(default=False, repr=False)

    @property
    def is_exposed(self) -> bool:
        """A Ray that was started here can be reached from other hosts."""
        return bool(self.folder) and self.node_ip != LOOPBACK

    def stop(self, patience_s: float = 3.0) -> tuple[processes.Process, ...]:
        """Disconnects; a Ray that was started here is gone afterwards with its files. Returns processes that would not end."""
        if self._ended:
            return ()
        self._ended = True
        # Listed before: children of the dashboard lose their parent, and their trace, when it goes.
        members = processes.family(self.folder) if self.folder else ()
        _disconnect()
        return end_local(self.folder, patience_s, members) if self.folder else ()


def start_ray(config: RayConfig, num_cpus: int, folder: str) -> RaySession:
    """Starts Ray with its files in `folder` (see make_folder) and connects to it; blocks for some seconds. It listens on the
    loopback address alone, and asks for the token in the folder, or for one that the operator has named.

    Raises RayFailed. Afterwards, or after a failure or an interruption, `end_local(folder)` ends what was started.
    """
    set_environment()
    token = config.token_file or given_token() or token_file(folder)
    # A Ray that runs elsewhere must not be joined by accident.
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    quiet()

    try:
        with presented(token), loopback_only(), _temporary_files_in(scratch_folder(folder)):
            context: Any = ray.init(
                address="local",
                namespace=config.namespace,
                num_cpus=num_cpus,
                include_dashboard=config.dashboard,
                dashboard_host=LOOPBACK,
                dashboard_port=free_port(LOOPBACK, config.dashboard_port),
                object_store_memory=config.object_store_bytes,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                job_config=job_config(),
                _node_ip_address=LOOPBACK,
                _temp_dir=ray_folder(folder),
                _metrics_export_port=config.metrics_port or None,
            )
    except Exception as error:  # Ray raises many kinds here, down to bare RuntimeError and ConnectionError
        raise RayFailed(f"Ray did not start: {' '.join(str(error).split())}") from error
    url = context.dashboard_url
    address, node_ip = context.address_info["address"], context.address_info["node_ip_address"]
    return RaySession(address, f"http://{url}" if url else "", node_ip, folder, token)


def free_port(host: str, first: int) -> int:
    """The first port from `first` on that nobody listens on. Raises RayFailed after 100 tries."""
    for port in range(first, min(first + 100, 65536)):
        if port_is_free(host, port):
            return port
    raise RayFailed(f"no free port from {first} to {first + 99} on {host}")


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now. Raises OSError when `host` is not an address of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (98, 48, 13):  # in use (Linux, macOS), not permitted
                return False
            raise
    return True


def _disconnect() -> None:
    import ray

    if ray.is_initialized():
        ray.shutdown()


@contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """Ray's processes inherit the folder for their temporary files, some of which they leave behind."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


_ADVICE = "is it running there (`ray status`), and is --ray-address right?"


def join_ray(address: str, namespace: str, token_file: str = "", node_ip: str = "") -> RaySession:
    """Connects to the Ray at `address` (HOST:PORT, or "auto": the one of this host) with the token in the file, or else in the
    operator's environment, or else of this user's cluster that has the address. Raises RayFailed.

    `node_ip` is the address of this host's node, where one was started for this process; empty: Ray finds it.
    """
    set_environment()
    address, token = _find(address, token_file or given_token())
    host, port = check_listens(address)
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
                _node_ip_address=node_ip or None,
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


def check_listens(address: str) -> tuple[str, int]:
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
