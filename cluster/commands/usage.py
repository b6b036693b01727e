"""`baton usage`: what tenants have used, from the usage log."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from cluster.commands.flags import add_cluster_flags, config_from
from cluster.commands.keys import duration
from workers.errors import InvalidConfig

GROUPS = ("tenant", "key_id", "model", "endpoint", "outcome")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "usage",
        help="what tenants have used",
        description="Adds up the usage log of the routers on this host (router.tenants.usage.folder; docs/tenants.md).",
    )
    parser.add_argument(
        "--since", type=duration, default=3600.0, metavar="TIME", help="such as 15m, 1h or 30d; default: 1h"
    )
    parser.add_argument("--by", choices=GROUPS, default="tenant", help="default: tenant")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="of the log; default: router.tenants.usage.folder")
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_cluster_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cluster.console.output import table
    from router.tenants.usage import totals
    from router.tenants.usage_log import read_usage

    folder = args.folder
    if folder is None:
        configured = config_from(args).router.tenants.usage.folder
        if not configured:
            raise InvalidConfig(
                "say where the usage log is: --folder DIR, or a configuration with router.tenants.usage.folder"
            )
        folder = Path(configured)
    if not folder.is_dir():
        raise InvalidConfig(f"{folder} is no folder: is router.tenants.usage.folder set, and has a router served?")
    groups = totals(read_usage(folder, time.time() - args.since), args.by)
    if args.json:
        print(json.dumps({name: asdict(total) for name, total in groups.items()}, indent=2, ensure_ascii=False))
        return 0
    head = (args.by.upper(), "REQUESTS", "NOT OK", "PROMPT TOKENS", "OF THEM CACHED", "OUTPUT TOKENS")
    rows = [(name or "-", *(f"{value:,}" for value in asdict(total).values())) for name, total in groups.items()]
    print(table(head, rows) if rows else "nothing was used in that time")
    return 0
