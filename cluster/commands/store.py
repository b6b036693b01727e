"""`baton store clear`: removes what a cluster that has ended left in Redis."""

from __future__ import annotations

import argparse
import asyncio

from cluster.commands.flags import add_cluster_flags, config_from


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("store", help="what a cluster keeps in Redis", description="Of a store in Redis.")
    actions = parser.add_subparsers(required=True, metavar="ACTION", title="actions")
    clear = actions.add_parser(
        "clear",
        help="delete all of it",
        description="Deletes all keys of the cluster (store.cluster), and those of its Ray. For clusters that have ended: "
        "one that runs would write some of them again.",
    )
    add_cluster_flags(clear)
    clear.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cluster.ray_session.node import ray_tables
    from cluster.store.clearing import clear

    config = config_from(args)
    found = asyncio.run(clear(config.store, ray_tables(config.store)))
    print(f"deleted {found} keys of cluster {config.store.cluster}")
    return 0
