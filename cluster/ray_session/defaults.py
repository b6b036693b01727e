"""Where Baton's processes differ from Ray's defaults, which are made for batch jobs; everything of Ray's that is private stands here.

`PRIVATE_NAMES` are there in the Ray versions that pyproject.toml admits; a test looks.
"""

from __future__ import annotations

import importlib
import logging
import os
import site
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    # Ray starts actors at niceness 15, so that any ordinary process of the host would take the processors from them.
    "RAY_worker_niceness": "0",
    # Ray kills actors when the host's memory is nearly full, whoever fills it: router and workers, for a stranger's sake.
    "RAY_memory_monitor_refresh_ms": "0",
    # start_timeout_s decides: a dashboard is some ten processes, which a busy host starts slowly.
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Read by Ray's processes when they start; what the operator has set wins."""

PRIVATE_NAMES: tuple[tuple[str, str, tuple[str, ...] | None], ...] = (
    ("ray._private.services", "resolve_ip_for_localhost", ("host",)),
    ("ray._private.worker", "print_to_stdstream", ("data", "ignore_prefix")),
    ("ray._raylet", "Config.initialize", None),
    ("ray._raylet", "AuthenticationTokenLoader.instance", None),
    ("ray._raylet", "AuthenticationTokenLoader.reset_cache", None),
)
"""Module, name and parameters (None: of a C++ function, which shows none)."""


def set_environment() -> None:
    """For Ray in this process, and for the processes that it starts."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


class _OwnPaths(list[str]):
    """Takes no further entries."""

    def extend(self, paths: Iterable[str]) -> None:
        """Ray calls this with the folder of the running script and the current folder."""


def job_config() -> Any:
    """A ray.job_config.JobConfig whose actors import Baton from where this process does, and nothing from the current folder.

    Ray puts the current folder first on every actor's path: a `router` or a `torch.py` in it would be run there.
    """
    config = importlib.import_module("ray.job_config").JobConfig()
    config._py_driver_sys_path = _OwnPaths(own_paths())
    return config


def own_paths() -> list[str]:
    """The folder that Baton's packages are in, unless every Python of this installation looks there anyway."""
    folder = Path(__file__).resolve().parents[2]
    installed = {Path(path).resolve() for path in (*site.getsitepackages(), site.getusersitepackages())}
    return [] if folder in installed else [str(folder)]


def quiet() -> None:
    """Ray warns of what is meant here, such as a start off the main thread, and prints to stdout when an actor dies."""
    logging.getLogger("ray").setLevel(logging.ERROR)  # the import has set another level
    worker: Any = importlib.import_module("ray._private.worker")
    worker.print_to_stdstream = lambda data, ignore_prefix: None


@contextmanager
def loopback_only() -> Iterator[None]:
    """Lets Ray keep a loopback address: it swaps that for an outer one, and then listens on every interface.

    Should Ray call another function for it, `RaySession.is_exposed` tells.
    """
    services: Any = importlib.import_module("ray._private.services")
    original = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = original


def own_address() -> str:
    """The address by which Ray's other nodes know this one."""
    return str(importlib.import_module("ray.util").get_node_ip_address())
