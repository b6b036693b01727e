"""`baton worker` and `baton router`: put one more worker or router into a running cluster, and stay with it.

Both join a running Ray. In containers of their own a worker brings its Ray node along (`--start-node`), and a router, which Ray
has nothing to place for, goes without (`--without-ray`).
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.commands.flags import add_cluster_flags, add_router_flags, config_from
from cluster.commands.ray_nodes import add_probe_flag
from cluster.console.output import StepPrinter
from workers.errors import InvalidConfig

if TYPE_CHECKING:
    from cluster.actors.pools import Pools
    from cluster.config import ClusterConfig
    from cluster.probes import Probes
    from cluster.ray_session.session import RaySession
    from workers.trust.parties import Party


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    worker = commands.add_parser(
        "worker",
        help="add a worker to a running Ray cluster",
        description="Starts a worker on this host in a running Ray cluster; Ctrl-C or SIGTERM drains it and removes it again.",
    )
    worker.add_argument("--role", choices=("prefill", "decode", "mixed"), default="mixed", help="default: mixed")
    worker.add_argument("--name", required=True, help="such as decode-3; it comes back under this name after a crash")
    worker.add_argument("--host", dest="worker_host", help="address for the others; default: this host's in Ray")
    worker.add_argument(
        "--start-node",
        action="store_true",
        help="start a Ray node at --host for this worker, and end it with this command: for containers",
    )
    add_probe_flag(worker)
    worker.set_defaults(run=run_worker)
    router = commands.add_parser(
        "router",
        help="add a router to a running cluster",
        description="Starts a router on this host in a running cluster; Ctrl-C removes it again.",
    )
    router.add_argument("--name", required=True, help="such as router-1")
    router.add_argument(
        "--without-ray",
        action="store_true",
        help="run the router in this process and find workers in Redis alone: for containers, whose end is a supervisor's matter",
    )
    add_router_flags(router)
    router.set_defaults(run=run_router)
    for parser in (worker, router):
        parser.add_argument(
            "--ray-address", default="auto", metavar="ADDRESS", help="auto (default: the Ray of this host) or HOST:PORT"
        )
        add_cluster_flags(parser)


def run_worker(args: argparse.Namespace) -> int:
    from cluster.commands.running import run_until_stopped
    from cluster.identity.folder import members
    from cluster.preflight import check_cache_folder, check_disk_tier, check_gpus, check_layout, check_model
    from workers.status import Role

    config = config_from(args)
    check_model(config.worker.model)
    check_disk_tier(config.worker, 1)
    check_cache_folder(config.worker)
    check_layout(config.worker)
    check_gpus(config)
    if args.worker_host:
        config = replace(config, worker=replace(config.worker, host=args.worker_host))
    elif args.start_node:
        raise InvalidConfig("--start-node needs --host: the address of this container for the others")
    progress = StepPrinter()

    def create(pools: Pools) -> Any:
        return pools.create_worker(args.name, Role(args.role))

    own = members([args.name], [])
    end_s = config.stop_timeout_s
    work = _attach(config, args.name, own, create, end_s, progress, args.start_node, args.probe_port)
    return run_until_stopped(work, "", progress)


def run_router(args: argparse.Namespace) -> int:
    from cluster.commands.running import run_until_stopped
    from cluster.identity.folder import members
    from cluster.preflight import check_port, check_tokenizer

    config = config_from(args)
    check_tokenizer(config.router.model)
    check_port(config.router.host, config.router.port, "--port")
    progress = StepPrinter()
    if args.without_ray:
        return run_until_stopped(_serve_here(config, args.name, progress), "", progress)

    def create(pools: Pools) -> Any:
        return pools.create_router(args.name)

    own = members([], [args.name])
    end_s = config.router.shutdown_timeout_s + config.stop_timeout_s
    return run_until_stopped(_attach(config, args.name, own, create, end_s, progress), "", progress)


async def _serve_here(config: ClusterConfig, name: str, progress: StepPrinter) -> int:
    """A router in this process, until cancelled. Raises InvalidConfig."""
    from cluster.actors.router_actor import RouterActor
    from cluster.identity.local import needs_certificates
    from cluster.preflight import check_store
    from cluster.steps import patiently

    if config.store.url == "memory" or not config.store.secret_file:
        raise InvalidConfig("--without-ray needs the store in Redis (--store redis://...) and store.secret_file")
    if needs_certificates(config.tls):
        raise InvalidConfig(
            "--without-ray needs a certificate: make one with `baton tls` and name its files in tls.cert, tls.key and tls.ca"
        )
    with progress.step("waiting for the store"):
        await patiently(lambda: check_store(config.store), config.start_timeout_s, progress)
    with progress.step(f"starting {name}"):
        store, namespace = config.store, config.ray.namespace
        router = RouterActor(name, config.router, store, namespace, config.tls, config.roles, log_config=config.log)
        url = await router.ready()
    print(f"{name} serves at {url}; Ctrl-C removes it", flush=True)
    with suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    with progress.step("finishing what runs"):
        await router.stop()
    return 0


async def _attach(
    config: ClusterConfig,
    name: str,
    own: list[tuple[Party, ...]],
    create: Callable[[Pools], Any],
    end_s: float,
    progress: StepPrinter,
    starts_node: bool = False,
    probe_port: int = 0,
) -> int:
    """Creates the actor, shows what becomes of it until cancelled, then removes it, for which it has `end_s`. Raises RayDied
    when its own node ends."""
    from cluster.actors.pools import Pools
    from cluster.actors.waiting import ask_head, leave, remove_actors, stop_actors, wait_ready, watched
    from cluster.commands.running import tell_changes
    from cluster.identity.local import join, needs_certificates
    from cluster.preflight import check_store
    from cluster.probes import Probes, ProbeServer
    from cluster.ray_session.failures import told
    from cluster.ray_session.node import END_S, while_it_lives
    from cluster.steps import patiently
    from cluster.store.actor_store import STORE_HOST_NAME
    from cluster.store.open import open_store

    if starts_node:
        with progress.step("waiting for the store"):
            await patiently(lambda: check_store(config.store), config.start_timeout_s, progress)
    else:
        await check_store(config.store)
    probes = Probes()
    async with AsyncExitStack() as stack:
        stack.enter_context(closing(ProbeServer(probes, config.worker.host, probe_port)))
        config, session, node = await stack.enter_async_context(_joined(config, starts_node, progress))
        pools = Pools(config, here=True)
        actor, head_is_gone = None, False
        watching: list[asyncio.Future[None]] = []

        async def serve() -> None:
            nonlocal actor, config, pools
            if config.store.url == "memory":
                store_host = await asyncio.to_thread(pools.create_store_host, True)
                await wait_ready({STORE_HOST_NAME: store_host}, config.start_timeout_s)
            if needs_certificates(config.tls):
                store = open_store(config.store, config.ray.namespace)
                config = replace(config, tls=await join(store, own))
                await store.close()
                pools = Pools(config, here=True)
            with told(name):
                actor = await asyncio.to_thread(create, pools)
            watching.append(asyncio.ensure_future(_watch(probes, actor)))
            with progress.step(f"starting {name}"):
                async with watched({name: actor}, progress):
                    await wait_ready({name: actor, **pools.ranks_of(name)}, config.start_timeout_s)
            with told(name):
                address = await actor.ready.remote()

            def announce() -> None:
                print(f"{name} serves at {address}; Ctrl-C removes it", flush=True)

            def on_members(names: frozenset[str]) -> None:
                probes.is_ready = name in names

            store = open_store(config.store, config.ray.namespace, progress.say)
            await tell_changes(store, config.store.lease_ttl_s, progress, announce, name, on_members)

        try:
            with suppress(asyncio.CancelledError):
                await while_it_lives(node, asyncio.ensure_future(serve()))
            return 0
        finally:
            for watch in watching:
                watch.cancel()
            if actor is not None:
                await leave(actor, name, config.worker.drain_timeout_s, progress)
                with progress.step(f"removing {name}"):
                    await stop_actors([actor], end_s)
                    if starts_node:
                        await _forget(config, name)

                    def remove() -> None:
                        remove_actors([actor])
                        pools.remove_worker(name)

                    if not await ask_head(remove, END_S):
                        head_is_gone = True
                        progress.say("Ray's head does not answer; the worker ends with its node")
            if not head_is_gone:
                await asyncio.to_thread(session.stop)


@asynccontextmanager
async def _joined(
    config: ClusterConfig, starts_node: bool, progress: StepPrinter
) -> AsyncIterator[tuple[ClusterConfig, RaySession, Any]]:
    """Connected to Ray, by a node of its own where it `starts_node`; the configuration with what is known of this host now."""
    from cluster.lifecycle import rearm_signals, with_secret
    from cluster.ray_session.node import outlive_head, plan_member, running_node
    from cluster.ray_session.running import with_ray
    from cluster.ray_session.session import LOOPBACK, check_listens, join_ray
    from cluster.steps import bounded, patiently

    ray = config.ray
    async with AsyncExitStack() as stack:
        node = None
        own_ip = config.worker.host if starts_node else ""
        if starts_node:
            with progress.step(f"waiting for Ray's head at {ray.address}"):
                await patiently(lambda: asyncio.to_thread(check_listens, ray.address), config.start_timeout_s, progress)
            with progress.step(f"starting a node of Ray at {own_ip}"):
                started = stack.enter_async_context(running_node(plan_member(ray, own_ip)))
                node = await bounded(started, config.start_timeout_s, "Ray did not start a node")
            outlive_head()
        with progress.step(f"joining Ray at {ray.address}"):
            joining = asyncio.to_thread(join_ray, ray.address, ray.namespace, ray.token_file, own_ip)
            session = await bounded(joining, config.start_timeout_s, f"Ray at {ray.address} did not answer")
        rearm_signals()
        if config.store.url != "memory" and not config.store.secret_file:
            known = with_ray(session.address)
            config = with_secret(config, known.secret_file if known else "")
        if config.worker.host == LOOPBACK:
            config = replace(config, worker=replace(config.worker, host=session.node_ip))
        yield config, session, node


async def _watch(probes: Probes, actor: Any) -> None:
    async def answers() -> object:
        return await actor.pid.options(enable_task_events=False).remote()  # no news for Ray's timeline

    await probes.watch(answers)


async def _forget(config: ClusterConfig, name: str) -> None:
    """Takes a name that nobody will have again, as that of a container, out of the store."""
    from cluster.membership.membership import DRAINS, ROLES, STARTS
    from cluster.roles.records import PINS, SWITCHES
    from cluster.store.open import open_store
    from cluster.store.store import StoreUnavailable

    with suppress(StoreUnavailable):
        store = open_store(config.store, config.ray.namespace)
        for prefix in (STARTS, ROLES, DRAINS, PINS, SWITCHES):
            await store.delete(prefix + name)
        await store.close()
