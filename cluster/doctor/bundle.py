"""Collects what explains a fault: findings, status, metrics, settings without secrets, ends of logs, stacks. Reads only."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from cluster.config import ClusterConfig
from cluster.console.router_client import authorities
from cluster.doctor.findings import Finding
from cluster.doctor.looking import LOOK_TIMEOUT_S, look_at_host, look_at_ray, look_at_router, look_at_store
from cluster.ray_session import processes
from cluster.ray_session.running import clusters

MAX_LOG_BYTES = 256 << 10
"""Of each log's end."""
MAX_LOGS = 100
MAX_STACKS = 32
STACK_TIMEOUT_S = 10.0
PAGES = {
    "status.json": "/admin/status",
    "roles.json": "/admin/roles",
    "metrics.txt": "/metrics",
    "version.json": "/version",
}
"""Of a router, by the file that they become."""
SECRETS = frozenset(("api_keys", "admin_keys"))


def collect(config: ClusterConfig, url: str, admin_key: str) -> dict[str, bytes]:
    """Files by name. What cannot be had says why in its place."""
    findings: list[Finding] = look_at_host() + asyncio.run(look_at_store(config)) + look_at_ray(config.ray.address)
    findings += look_at_router(url, admin_key)
    parts = {
        "doctor.txt": "\n".join(map(str, findings)).encode(),
        "settings.json": to_json(without_secrets(asdict(config))),
    }
    headers = {"authorization": f"Bearer {admin_key}"} if admin_key else {}
    with httpx.Client(
        base_url=url, timeout=LOOK_TIMEOUT_S, headers=headers, trust_env=False, verify=authorities(url)
    ) as client:
        for name, path in PAGES.items():
            try:
                parts[name] = client.get(path).content
            except httpx.HTTPError as error:
                parts[name] = f"no answer: {error}".encode()
    return parts | _logs() | _stacks()


def without_secrets(settings: Any, name: str = "") -> Any:
    """Keys, and what stands before the host in URLs, are left out; files that hold secrets are named, not read."""
    if name in SECRETS:
        return f"{len(settings)} keys"
    if isinstance(settings, Mapping):
        return {key: without_secrets(value, str(key)) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [without_secrets(value) for value in settings]
    if isinstance(settings, str) and "://" in settings:
        parts = urlsplit(settings)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return settings


def write(path: Path, folder: str, parts: Mapping[str, bytes]) -> None:
    """A tar.gz that only this user can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in parts.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mtime, entry.mode = len(content), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(content))


def to_json(value: Any) -> bytes:
    return json.dumps(value, indent=2, default=str).encode()


def _logs() -> dict[str, bytes]:
    """Ends of the newest logs of Ray and the actors, of this user's clusters here or of the container's own Ray."""
    folders = [Path(each.folder, "ray", "session_latest", "logs") for each in clusters()]
    folders.append(Path(os.environ.get("TMPDIR", "/tmp"), "ray", "session_latest", "logs"))
    found: list[tuple[float, Path]] = []
    for folder in folders:
        for path in folder.glob("*"):
            with suppress(OSError):
                if path.is_file() and path.suffix in (".log", ".out", ".err") and path.stat().st_size:
                    found.append((path.stat().st_mtime, path))
    logs = {}
    for _, path in sorted(found, reverse=True)[:MAX_LOGS]:
        with suppress(OSError), path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - MAX_LOG_BYTES))
            logs[f"logs/{path.name}"] = file.read()
    return logs


def _stacks() -> dict[str, bytes]:
    """By py-spy, which Ray brings along, of processes that are Baton's; it may need ptrace's permission."""
    # Beside the interpreter: an environment need not be on the path.
    spy = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if spy is None:
        return {"stacks/none.txt": b"there is no py-spy"}
    members = [process for each in clusters() for process in processes.family(each.folder)]
    found = {}
    for process in [p for p in members if "python" in p.command or p.command.startswith("ray::")][:MAX_STACKS]:
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                [spy, "dump", "--pid", str(process.pid)], capture_output=True, timeout=STACK_TIMEOUT_S
            )
            found[f"stacks/{process.pid}.txt"] = f"{process.command[:200]}\n".encode() + (done.stdout or done.stderr)
    return found
