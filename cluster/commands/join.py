"""`baton worker` and `baton router`: put one more actor of this host into a running Ray cluster, and stay with it."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.commands.flags import add_cluster_flags, add_router_flags, config_from
from cluster.console.output import StepPrinter

if TYPE_CHECKING:
    from cluster.actors.pools import Pools
    from cluster.config import ClusterConfig
    from workers.trust.parties import Party


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    worker = commands.add_parser(
        "worker",
        help="add a worker to a running Ray cluster",
        description="Starts a worker on this host in a running Ray cluster; Ctrl-C removes it again.",
    )
    worker.add_argument("--role", choices=("prefill", "decode", "mixed"), default="mixed", help="default: mixed")
    worker.add_argument("--name", required=True, help="such as decode-3; it comes back under this name after a crash")
    worker.add_argument("--host", dest="worker_host", help="address for the others; default: this host's in Ray")
    worker.set_defaults(run=run_worker)
    router = commands.add_parser(
        "router",
        help="add a router to a running Ray cluster",
        description="Starts a router on this host in a running Ray cluster; Ctrl-C removes it again.",
    )
    router.add_argument("--name", required=True, help="such as router-1")
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
    progress = StepPrinter()

    def create(pools: Pools) -> Any:
        return pools.create_worker(args.name, Role(args.role))

    own = members([args.name], [])
    return run_until_stopped(_attach(config, args.name, own, create, progress), "", progress)


def run_router(args: argparse.Namespace) -> int:
    from cluster.commands.running import run_until_stopped
    from cluster.identity.folder import members
    from cluster.preflight import check_port, check_tokenizer

    config = config_from(args)
    check_tokenizer(config.router.model)
    check_port(config.router.host, config.router.port, "--port")
    progress = StepPrinter()

    def create(pools: Pools) -> Any:
        return pools.create_router(args.name)

    own = members([], [args.name])
    return run_until_stopped(_attach(config, args.name, own, create, progress), "", progress)


async def _attach(
    config: ClusterConfig, name: str, own: list[tuple[Party, ...]], create: Any, progress: StepPrinter
) -> int:
    """Creates the actor, shows what becomes of it until cancelled, then removes it."""
    from cluster.actors.pools import Pools
    from cluster.commands.running import tell_changes
    from cluster.identity.local import join, needs_certificates
    from cluster.lifecycle import bounded, leave, rearm_signals, remove_actors, stop_actors, wait_ready, with_secret
    from cluster.preflight import check_store
    from cluster.ray_session.failures import told
    from cluster.ray_session.running import with_ray
    from cluster.ray_session.session import LOOPBACK, join_ray
    from cluster.store.actor_store import STORE_HOST_NAME
    from cluster.store.open import open_store

    await check_store(config.store)
    with progress.step(f"joining Ray at {config.ray.address}"):
        joining = asyncio.to_thread(join_ray, config.ray.address, config.ray.namespace, config.ray.token_file)
        session = await bounded(joining, config.start_timeout_s, f"Ray at {config.ray.address} did not answer")
    rearm_signals()
    if config.store.url != "memory" and not config.store.secret_file:
        known = with_ray(session.address)
        config = with_secret(config, known.secret_file if known else "")
    if config.worker.host == LOOPBACK:
        config = replace(config, worker=replace(config.worker, host=session.node_ip))
    pools = Pools(config, here=True)
    actor = None
    try:
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
        with progress.step(f"starting {name}"):
            await wait_ready({name: actor, **pools.ranks_of(name)}, config.start_timeout_s)
        with told(name):
            print(f"{name} serves at {await actor.ready.remote()}; Ctrl-C removes it", flush=True)
        with suppress(asyncio.CancelledError):
            await tell_changes(config, progress, only=name)
        return 0
    finally:
        if actor is not None:
            await leave(actor, name, config.worker.drain_timeout_s, progress)
            with progress.step(f"removing {name}"):
                await stop_actors([actor], config.router.shutdown_timeout_s + config.stop_timeout_s)
                await asyncio.to_thread(remove_actors, [actor])
                await asyncio.to_thread(pools.remove_worker, name)
        await asyncio.to_thread(session.stop)
