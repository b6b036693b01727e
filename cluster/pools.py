"""Creates and finds the actors of a cluster by name: workers per role, routers, the controller."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actors import RouterActor, WorkerActor, WorkerFactory
from cluster.config import ClusterConfig
from cluster.controller import CONTROLLER_NAME, Controller
from workers.errors import InvalidConfig
from workers.status import Role


class Pools:
    """The actors of one namespace. `here` binds new ones to this host, where the one who asked for them is."""

    def __init__(self, config: ClusterConfig, here: bool = False) -> None:
        self._config = config
        self._here = here

    def create_controller(self, outlive: bool = False) -> Any:
        """The controller; the running one, if there is one already. `outlive`: it stays when this process has left Ray."""
        options = {**self._options(CONTROLLER_NAME), "get_if_exists": True}
        if outlive:
            options |= {"lifetime": "detached", "scheduling_strategy": "DEFAULT"}
        return ray.remote(Controller).options(**options).remote()

    def create_worker(self, worker_id: str, role: Role, factory: WorkerFactory | None = None) -> Any:
        """Raises InvalidConfig when a live actor has the name."""
        config = self._config
        self._claim(worker_id)
        return (
            ray.remote(WorkerActor)
            .options(**self._worker_options(worker_id))
            .remote(worker_id, config.worker, role, config.store, config.ray.namespace, factory)
        )

    def create_router(self, router_id: str, at: int = 0) -> Any:
        """Router number `at` of this host listens `at` ports above the configured one."""
        config = self._config
        self._claim(router_id)
        router = config.router_at(at)
        return (
            ray.remote(RouterActor)
            .options(**self._options(router_id))
            .remote(router_id, router, config.store, config.ray.namespace)
        )

    def find(self, name: str) -> Any | None:
        """The actor with this name, in whatever state; None when there is none."""
        try:
            return ray.get_actor(name, namespace=self._config.ray.namespace)
        except ValueError:
            return None

    def _claim(self, name: str) -> None:
        """Frees the name of an actor that no longer answers, such as one on a lost host."""
        actor = self.find(name)
        if actor is None:
            return
        try:
            ray.get(actor.pid.remote(), timeout=5.0)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            ray.kill(actor, no_restart=True)
            return
        raise InvalidConfig(
            f"an actor named {name!r} runs already in namespace {self._config.ray.namespace!r}; "
            "choose another name (--name) or another namespace (--set ray.namespace=...)"
        )

    def _worker_options(self, name: str) -> dict[str, Any]:
        is_cuda = self._config.worker.device != "cpu"
        return self._options(name) | ({"num_gpus": self._config.ray.worker_gpus} if is_cuda else {})

    def _options(self, name: str) -> dict[str, Any]:
        options: dict[str, Any] = {
            "name": name,
            "namespace": self._config.ray.namespace,
            "num_cpus": self._config.ray.actor_cpus,
            "max_restarts": -1,
            "max_task_retries": 0,
        }
        if self._here:
            node_id = ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id, soft=False)
        return options
