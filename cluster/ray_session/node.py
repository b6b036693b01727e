"""A node of a Ray that spans containers or hosts, kept by this process: `ray start --block` as a child, watched, and ended with it.

Made for containers with one command each, where the end of that command ends everything else too.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from cluster.config import ClusterConfig, RayConfig
from cluster.ray_session.auth import given_token
from cluster.ray_session.deaths import RayDied
from cluster.ray_session.defaults import ENVIRONMENT
from cluster.ray_session.session import RayFailed
from cluster.secret_files import read_secret
from cluster.store.store import StoreConfig
from workers.errors import InvalidConfig
from workers.machine.limits import usable_cpus

STARTED = "Ray runtime started"
"""What Ray prints when a node runs."""
RECONNECT_S = 600
"""How long nodes and actors wait for a head that is started again; what they do goes on meanwhile."""
END_S = 20.0
"""How long Ray's processes may take to end by themselves."""
ATTEMPTS = 3
_KEPT_LINES = 20
_RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What a node is started with: arguments of `ray start`, and variables beside those that are there."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]


def plan_head(config: ClusterConfig, host: str, port: int, dashboard_host: str = "") -> NodePlan:
    """A head that places no actors on itself. With the store in Redis, Ray keeps its tables there too, and a head that is started
    again goes on from them. Raises InvalidConfig.
    """
    arguments = ["--head", f"--port={port}", f"--node-ip-address={host}", "--num-cpus=0", "--num-gpus=0"]
    arguments += [
        f"--include-dashboard={str(config.ray.dashboard).lower()}",
        f"--dashboard-host={dashboard_host or host}",
    ]
    arguments += [f"--dashboard-port={config.ray.dashboard_port}"]
    environment = _environment(config.ray)
    if config.store.url != "memory":
        more, tables = _tables_in_redis(config.store)
        arguments += more
        environment |= tables
    return NodePlan((*arguments, *_shared(config.ray)), environment)


def plan_member(config: RayConfig, host: str, num_cpus: int = 0) -> NodePlan:
    """A further node of the Ray at `config.address`. `num_cpus` 0: what this container may use. Raises InvalidConfig."""
    name, _, port = config.address.rpartition(":")
    if not name or not port.isdigit():
        raise InvalidConfig(f"--ray-address must be HOST:PORT of the head; it is {config.address!r}")
    arguments = (f"--address={config.address}", f"--node-ip-address={host}", f"--num-cpus={num_cpus or usable_cpus()}")
    return NodePlan((*arguments, *_shared(config)), _environment(config))


def _shared(config: RayConfig) -> Sequence[str]:
    port = (f"--metrics-export-port={config.metrics_port}",) if config.metrics_port else ()
    return (f"--object-store-memory={config.object_store_bytes}", "--disable-usage-stats", "--block", *port)


def _environment(config: RayConfig) -> dict[str, str]:
    """Ray's own variables; a node without a token would let whoever reaches it run code."""
    token = config.token_file or given_token()
    if not token:
        raise InvalidConfig(
            "a Ray that spans hosts asks for a token: name the file that holds it, the same on every host (--set ray.token_file=PATH, "
            "or RAY_AUTH_TOKEN_PATH)"
        )
    variables = {
        **{name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()},
        "RAY_AUTH_MODE": "token",
        _RECONNECT: str(RECONNECT_S),
        # Its actors are gone by the time that a node is ended.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "5",
    }
    return variables | ({"RAY_AUTH_TOKEN_PATH": config.token_file} if config.token_file else {})


def outlive_head() -> None:
    """Has Ray in this process wait for a head that is started again as nodes do; before it is imported."""
    os.environ.setdefault(_RECONNECT, str(RECONNECT_S))


def _tables_in_redis(store: StoreConfig) -> tuple[list[str], dict[str, str]]:
    """Ray knows no database numbers: its keys stand in database 0 under a name of their own."""
    parts = urlsplit(store.url)
    if parts.scheme == "unix":
        raise InvalidConfig("Ray reaches Redis by redis:// or rediss:// only; store.url is unix://")
    address = f"{parts.hostname}:{parts.port or 6379}"
    environment = {
        "RAY_REDIS_ADDRESS": f"rediss://{address}" if parts.scheme == "rediss" else address,
        "RAY_external_storage_namespace": ray_tables(store),
    }
    for name, path in (("CA_CERT", store.ca_file), ("CLIENT_CERT", store.cert_file), ("CLIENT_KEY", store.key_file)):
        if path:
            environment[f"RAY_REDIS_{name}"] = path
    user, password = store.username or unquote(parts.username or ""), unquote(parts.password or "")
    if store.password_file:
        password = read_secret(store.password_file, "store.password_file")
    arguments = [f"--redis-username={user}"] if user else []
    return arguments + ([f"--redis-password={password}"] if password else []), environment


def ray_tables(store: StoreConfig) -> str:
    """The name that Ray's keys in Redis begin with."""
    return f"baton-{store.cluster}"


class RayNode:
    """A node that runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._last: deque[str] = deque(maxlen=_KEPT_LINES)
        self._reading: asyncio.Task[None] | None = None

    async def until_started(self) -> None:
        """Raises RayFailed when it ends before."""
        async for line in self._lines():
            if STARTED in line:
                self._reading = asyncio.ensure_future(self._read_on())
                return
        raise RayFailed(f"Ray did not start a node here: {' '.join(self._last)[-500:]}")

    async def died(self) -> None:
        """Raises RayDied when Ray's processes here have ended. Cancel it."""
        code = await self._process.wait()
        raise RayDied(f"Ray's node here has ended by itself (exit code {code}): {' '.join(self._last)[-300:]}")

    async def end(self) -> None:
        """Ends it; what does not within END_S is killed."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(END_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        if self._reading is not None:
            self._reading.cancel()

    async def _read_on(self) -> None:
        async for _ in self._lines():
            pass

    async def _lines(self) -> AsyncIterator[str]:
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            line = raw.decode(errors="replace").strip()
            if line:
                self._last.append(line)
            yield line


@asynccontextmanager
async def running_node(plan: NodePlan) -> AsyncIterator[RayNode]:
    """The node, from its start to the end of the context. Raises RayFailed."""
    node = await _start(plan)
    try:
        yield node
    finally:
        await asyncio.shield(asyncio.ensure_future(node.end()))


async def _start(plan: NodePlan) -> RayNode:
    """Ray gives a raylet 30 s, which is not always enough for a host on which many start at once: it is tried ATTEMPTS times."""
    failure = RayFailed("")
    for _ in range(ATTEMPTS):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            *plan.arguments,
            env={**os.environ, **plan.environment},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which lets its actors leave first
        )
        node = RayNode(process)
        try:
            await node.until_started()
            return node
        except RayFailed as error:
            failure = error
            await node.end()
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(node.end()))
            raise
    raise failure


async def while_it_lives(node: RayNode | None, work: asyncio.Future[None]) -> None:
    """Awaits `work`, for as long as the node lives. Raises RayDied."""
    jobs: set[asyncio.Future[None]] = {work}
    if node is not None:
        jobs.add(asyncio.ensure_future(node.died()))
    try:
        done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        for job in done:
            job.result()
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
