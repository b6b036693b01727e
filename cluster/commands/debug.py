"""`baton debug bundle`: collects what somebody far away needs to understand a cluster, and no secrets."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from cluster.commands.flags import add_admin_flags, add_cluster_flags, client_target, config_from


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("debug", help="collect what explains a fault", description="Of a running cluster.")
    actions = parser.add_subparsers(required=True, metavar="ACTION", title="actions")
    bundle = actions.add_parser(
        "bundle",
        help="status, settings, metrics, logs and stacks in one archive",
        description="Writes an archive with the doctor's findings, status, metrics, settings without secrets, the last of the logs of "
        "this host's clusters, and stacks of their processes. Logs hold no prompts; names of hosts and workers they do hold.",
    )
    bundle.add_argument("--out", type=Path, metavar="FILE", help="default: baton-debug-TIME.tar.gz here")
    add_admin_flags(bundle)
    add_cluster_flags(bundle)
    bundle.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cluster.doctor.bundle import collect, write

    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = args.out or Path(f"baton-debug-{stamp}.tar.gz")
    parts = collect(config_from(args), *client_target(args))
    write(path, f"baton-debug-{stamp}", parts)
    print(f"{path}: {len(parts)} files, {sum(map(len, parts.values())) / 2**20:.1f} MiB before packing")
    return 0
