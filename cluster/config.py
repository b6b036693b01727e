"""The settings of a whole cluster, and how a file and the command line become them; the environment is the CLI's alone."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Lt

from cluster.hub import HubConfig
from cluster.roles.config import RolesConfig
from cluster.settings import build, from_environment, json_schema, lay, override
from cluster.store.store import StoreConfig
from router.config import RouterConfig
from workers.config import Delay, Natural, Seconds, Share, Text, WorkerConfig
from workers.errors import InvalidConfig
from workers.status import Role
from workers.trust.config import TlsConfig

MIN_OBJECT_STORE_BYTES = 75 * 2**20
"""Ray refuses less."""
MAX_WORKERS = 1024


def check_roles(num_prefill: int, num_decode: int, num_mixed: int) -> None:
    """Raises InvalidConfig unless the pools together can serve a request."""
    if num_prefill + num_mixed == 0:
        raise InvalidConfig("no worker could prefill: set pools.prefill or pools.mixed to at least 1")
    if num_decode + num_mixed == 0:
        raise InvalidConfig("no worker could decode: set pools.decode or pools.mixed to at least 1")


@dataclass(frozen=True, slots=True)
class PoolsConfig:
    """How many of each to start; worker `prefill-0` is the first of the prefill pool."""

    prefill: Natural = 1
    decode: Natural = 1
    mixed: Natural = 0
    routers: Annotated[int, Ge(1), Le(64)] = 1
    """The first router listens on router.port, each further one on the next port."""
    share_port: bool = False
    """All routers of this host listen on router.port, and the kernel deals connections out (SO_REUSEPORT); `--routers` says so too."""
    cpu_sets: tuple[str, ...] = ()
    """One worker.cpus for each worker, in the order prefill, decode, mixed, so that they do not share processors; empty: worker.cpus holds for all."""

    def __post_init__(self) -> None:
        check_roles(self.prefill, self.decode, self.mixed)
        if self.cpu_sets and len(self.cpu_sets) != len(self.workers):
            raise InvalidConfig(
                f"pools.cpu_sets must have an entry for each of the {len(self.workers)} workers; it has {len(self.cpu_sets)}"
            )
        if self.prefill + self.decode + self.mixed > MAX_WORKERS:
            raise InvalidConfig(f"pools hold at most {MAX_WORKERS} workers together")

    @property
    def workers(self) -> tuple[tuple[str, Role], ...]:
        """Id and role of every worker, prefill first."""
        counts = ((Role.PREFILL, self.prefill), (Role.DECODE, self.decode), (Role.MIXED, self.mixed))
        return tuple((f"{role.value}-{at}", role) for role, count in counts for at in range(count))


@dataclass(frozen=True, slots=True)
class RayConfig:
    """The Ray that places and supervises the actors. No token and no KV passes through it."""

    address: str = ""
    """Empty: start Ray on this host and stop it at the end; "auto" or HOST:PORT: join a running Ray."""
    namespace: Text = "baton"
    """Actors of one cluster find each other by name in here; two clusters in one Ray need two namespaces."""
    token_file: str = ""
    """Holds the token that Ray asks for. Empty: what RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH says; else a Ray that is started here
    gets a new one, and one that is joined has it in the folder of its cluster where `baton serve` of this user has started it."""
    dashboard: bool = False
    """Ray's dashboard, which asks for the same token."""
    dashboard_port: Annotated[int, Ge(1), Lt(65536)] = 8265
    """The next free port is taken when this one is in use."""
    metrics_port: Annotated[int, Ge(0), Lt(65536)] = 0
    """Where each node's figures of Ray are, Baton's gauges among them (docs/observability.md); 0: a free one."""
    object_store_bytes: Annotated[int, Ge(MIN_OBJECT_STORE_BYTES)] = 80 * 2**20
    """Shared memory for Ray's own objects; Baton puts none there. Ray needs at least 75 MiB."""
    actor_cpus: Annotated[float, Ge(0), Le(1024)] = 0.01
    """CPU share that each actor reserves in Ray's book-keeping; small, so that a laptop holds a whole cluster."""
    worker_gpus: Share = 1.0
    """GPUs that each worker, or each rank of one, reserves when worker.device is cuda; it sees no other. A fraction lets
    several share one."""
    rank_placement: Literal["pack", "spread"] = "pack"
    """Where the ranks of a worker go: pack: on one node where they fit; spread: on different nodes as far as there are."""
    placement_timeout_s: Seconds = 15.0
    """How long a worker's ranks wait for Ray to have room for all of them."""
    leader_timeout_s: Seconds = 120.0
    """How long ranks keep their weights for a leader that is being started again."""


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Logs of workers and routers."""

    format: Literal["text", "json"] = "text"
    """json: an object a line, with time, level, name, logger, message, and request_id and trace_id where it is about a request."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """What is less than this is left out. debug: a line for each request that a worker takes and ends."""


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Everything that `baton serve` starts."""

    worker: WorkerConfig
    router: RouterConfig
    """Its model is the workers' unless it names its own copy."""
    pools: PoolsConfig = field(default_factory=PoolsConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    """For a worker.model that is OWNER/NAME of a repository on the Hugging Face Hub."""
    store: StoreConfig = field(default_factory=StoreConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    roles: RolesConfig = field(default_factory=RolesConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    log: LogConfig = field(default_factory=LogConfig)
    start_timeout_s: Seconds = 180.0
    """Each step of the start must be done within this time."""
    stop_timeout_s: Delay = 10.0
    """Time for routers (beyond router.shutdown_timeout_s) and workers to stop by themselves before their processes are ended."""

    def __post_init__(self) -> None:
        if self.pools.share_port and not self.router.port:
            raise InvalidConfig("routers share a port that is known before they start: set router.port (--port)")

    def worker_named(self, worker_id: str) -> WorkerConfig:
        """The settings of one worker: those of all, on the processors that pools.cpu_sets gives it."""
        names = [name for name, _ in self.pools.workers]
        if not self.pools.cpu_sets or worker_id not in names:
            return self.worker
        return replace(self.worker, cpus=self.pools.cpu_sets[names.index(worker_id)])

    def router_at(self, at: int) -> RouterConfig:
        """The settings of router number `at`: like the first, on a socket of its own and, unless they share it, on a port."""
        uds = f"{self.router.uds}.{at}" if at and self.router.uds else self.router.uds
        own = 0 if self.pools.share_port or not self.router.port else at
        return replace(self.router, port=self.router.port + own, uds=uds, share_port=self.pools.share_port)


def load_config(
    path: Path | None,
    flags: Mapping[str, Any],
    assignments: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
) -> ClusterConfig:
    """The configuration from a file (YAML, JSON or TOML); over it the environment, the common flags, `a.b=c` texts, in this order.

    `flags` maps dotted names to values; None stands for a flag that was not given. Raises InvalidConfig.
    """
    values = read_file(path) if path else {}
    for given in (from_environment(environment or {}), flags):
        for name, value in given.items():
            if value is not None:
                values = lay(values, name.split("."), value)
    values = override(values, assignments)
    worker, router = values.get("worker"), values.get("router", {})
    if isinstance(worker, Mapping) and isinstance(router, Mapping) and "model" in worker:
        values["router"] = {"model": worker["model"], **router}
    return build(ClusterConfig, values)


def read_file(path: Path) -> dict[str, Any]:
    """The mapping in a configuration file; its suffix tells the format. Raises InvalidConfig."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            values: Any = tomllib.loads(text)
        elif path.suffix == ".json":
            values = json.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            values = _read_yaml(text)
        else:
            raise InvalidConfig(f"the name of a configuration file ends in .yaml, .json or .toml; this is {path}")
    except OSError as error:
        raise InvalidConfig(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidConfig(f"cannot parse the configuration {path}: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InvalidConfig(f"the configuration {path} must be a mapping of settings")
    return values


def schema() -> dict[str, Any]:
    """The JSON Schema of configuration files."""
    return json_schema(ClusterConfig, "Baton cluster configuration")


def _read_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
