"""Knocks at the ports of a Ray as a stranger on the host would: what listens where, and what it does for whom."""

from __future__ import annotations

import http.client
import ipaddress
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import grpc

from cluster.ray_session.processes import Process

JOB = b'{"entrypoint": "true"}'
TIMEOUT_S = 20.0
METHODS = (
    "NodeInfoGcsService/GetClusterId",
    "NodeManagerService/GetNodeStats",
    "CoreWorkerService/GetCoreWorkerStats",
    "ObjectManagerService/Push",
    "ReporterService/GetTraceback",
)


def sockets(members: Iterable[Process]) -> set[tuple[str, int]]:
    """Address and port of every TCP socket that one of these processes listens on."""
    inodes = set()
    for process in members:
        with suppress(OSError):  # it has ended meanwhile
            for entry in os.scandir(f"/proc/{process.pid}/fd"):
                with suppress(OSError):
                    inodes.add(os.readlink(entry.path))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, _, port = fields[1].partition(":")
                found.add((_address(address), int(port, 16)))
    return found


def knock(port: int, token: str = "") -> str:
    """What comes of asking this port to run a job: the HTTP status, or the status of a gRPC call where it speaks that."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", "/api/job_agent/jobs/", JOB, {"Content-Type": "application/json", **headers})
        return str(connection.getresponse().status)
    except (http.client.HTTPException, OSError):
        return _call(port, token)
    finally:
        connection.close()


def _call(port: int, token: str) -> str:
    """The first answer that is not about an unknown method: GCS, raylet, worker, object manager and agent have one here each."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    code = "UNIMPLEMENTED"
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        for method in METHODS:
            try:
                channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=TIMEOUT_S, metadata=metadata)
                return "OK"
            except grpc.RpcError as error:
                code = str(error.code().name)
                if code != "UNIMPLEMENTED":
                    break
    return code


def _address(text: str) -> str:
    """An address of /proc/net: words of four bytes, each as the host keeps numbers."""
    words = [bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
