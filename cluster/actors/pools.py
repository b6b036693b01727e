"""Creates and finds the actors of a cluster by name: workers per role with their ranks, routers, the host of the store."""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.actors.placement import NoRoom, bundle_order, rank_bundles, rank_name, what_is_missing
from cluster.actors.ranks import RankActor
from cluster.actors.router_actor import RouterActor
from cluster.actors.worker_actor import WorkerActor, WorkerFactory
from cluster.config import ClusterConfig
from cluster.membership.steady_time import SteadyTime
from cluster.ray_session.defaults import own_address
from cluster.store.actor_store import STORE_HOST_NAME, StoreHost
from workers.errors import InvalidConfig
from workers.status import Role


class Pools:
    """The actors of one namespace. `here` binds new ones to this host, where the one who asked for them is."""

    def __init__(self, config: ClusterConfig, here: bool = False) -> None:
        self._config = config
        self._here = here
        self._clock = SteadyTime.here()
        self._ranks: dict[str, list[Any]] = {}
        """Held, as Ray ends an actor that nobody holds: the followers of each worker, and their placement group."""
        self._groups: dict[str, PlacementGroup] = {}

    def create_store_host(self, outlive: bool = False) -> Any:
        """The host of the store; the running one, if there is one already. `outlive`: it stays when this process has left Ray."""
        # Renewed leases would be most of what Ray's timeline shows.
        options = {**self._options(STORE_HOST_NAME), "get_if_exists": True, "enable_task_events": False}
        if outlive:
            options |= {"lifetime": "detached", "scheduling_strategy": "DEFAULT"}
        return ray.remote(StoreHost).options(**options).remote()

    def create_worker(self, worker_id: str, role: Role, factory: WorkerFactory | None = None) -> Any:
        """The worker's actor, which leads its ranks where it has several. They live in one placement group, and go with it.

        Raises InvalidConfig when a live actor has the name, NoRoom when Ray has not the resources.
        """
        config = self._config
        self._claim(worker_id)
        size = config.worker.parallel.size
        if size == 1:
            options = self._worker_options(worker_id)
            worker, *_ = self._create_ranks(worker_id, role, factory, [options], "")
            return worker
        group = self._reserve(worker_id)
        try:
            nodes = placement_group_table(group)["bundles_to_node_id"]
            places = bundle_order([nodes[at] for at in range(size)])
            options_of_ranks = [
                self._rank_options(rank_name(worker_id, rank), group, place) for rank, place in enumerate(places)
            ]
            worker, *ranks = self._create_ranks(worker_id, role, factory, options_of_ranks, secrets.token_hex(16))
        except BaseException:
            remove_placement_group(group)
            raise
        self._ranks[worker_id] = ranks
        self._groups[worker_id] = group
        return worker

    def ranks_of(self, worker_id: str) -> dict[str, Any]:
        """The actors of a worker's further ranks by name, as created here."""
        ranks = self._ranks.get(worker_id, [])
        return {rank_name(worker_id, rank): actor for rank, actor in enumerate(ranks, start=1)}

    def remove_worker(self, worker_id: str) -> None:
        """Ends the worker's process for good, and those of its ranks."""
        actor = self.find(worker_id)
        if actor is not None:
            with suppress(Exception):
                ray.kill(actor, no_restart=True)
        self._release(worker_id)

    def _create_ranks(
        self,
        worker_id: str,
        role: Role,
        factory: WorkerFactory | None,
        options: list[dict[str, Any]],
        secret: str,
    ) -> list[Any]:
        """The actors of all ranks, the leader first."""
        config = self._config
        leader = (
            ray.remote(WorkerActor)
            .options(**options[0])
            .remote(
                worker_id,
                config.worker_named(worker_id),
                role,
                config.store,
                config.ray.namespace,
                config.tls,
                self._clock,
                factory,
                secret,
                config.log,
            )
        )
        followers = [
            ray.remote(RankActor)
            .options(**rank_options)
            .remote(
                worker_id, rank, config.worker, config.ray.namespace, secret, config.ray.leader_timeout_s, config.log
            )
            for rank, rank_options in enumerate(options[1:], start=1)
        ]
        return [leader, *followers]

    def _reserve(self, worker_id: str) -> PlacementGroup:
        """Resources for every rank, all of them or none. Raises NoRoom."""
        config = self._config
        here = own_address() if self._here else ""
        bundles = rank_bundles(config, here)
        strategy = config.ray.rank_placement
        group: PlacementGroup = placement_group(bundles, strategy.upper(), name=self._group_name(worker_id))
        if group.wait(config.ray.placement_timeout_s):
            return group
        remove_placement_group(group)
        known: Any = ray
        raise NoRoom(
            what_is_missing(worker_id, bundles, strategy, known.available_resources(), known.cluster_resources())
        )

    def _release(self, worker_id: str) -> None:
        """Ends what is left of a worker's ranks, and gives their resources back."""
        self._ranks.pop(worker_id, None)
        group = self._groups.pop(worker_id, None)
        with suppress(ValueError):
            remove_placement_group(group or ray.util.get_placement_group(self._group_name(worker_id)))

    def _group_name(self, worker_id: str) -> str:
        """Placement groups of all namespaces share their names."""
        return f"{self._config.ray.namespace}/{worker_id}"

    def create_router(self, router_id: str, at: int = 0, held_ports: str = "") -> Any:
        """Router number `at` of this host listens `at` ports above the configured one, or on what is held for it."""
        config = self._config
        self._claim(router_id)
        router = config.router_at(at)
        return (
            ray.remote(RouterActor)
            .options(**self._options(router_id))
            .remote(
                router_id, router, config.store, config.ray.namespace, config.tls, config.roles, held_ports, config.log
            )
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
            self._release(name)
            return
        raise InvalidConfig(
            f"an actor named {name!r} runs already in namespace {self._config.ray.namespace!r}; "
            "choose another name (--name) or another namespace (--set ray.namespace=...)"
        )

    def _worker_options(self, name: str) -> dict[str, Any]:
        is_cuda = self._config.worker.device != "cpu"
        return self._options(name) | ({"num_gpus": self._config.ray.worker_gpus} if is_cuda else {})

    def _rank_options(self, name: str, group: PlacementGroup, bundle: int) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        return self._worker_options(name) | {"scheduling_strategy": strategy}

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
