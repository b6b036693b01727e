"""`baton stop`: ends a cluster that `baton serve` of the same user keeps on this host, attached to a terminal or not."""

from __future__ import annotations

import argparse
import os
import signal
import time
from contextlib import suppress

from workers.errors import BatonError, InvalidConfig

_POLL_S = 0.1


class StopTimeout(BatonError):
    """The cluster is still there; it stops on."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    stop = commands.add_parser(
        "stop",
        help="stop a cluster of this host",
        description="Stops a cluster that `baton serve` of this user runs on this host: what runs there may finish, as with Ctrl-C.",
    )
    stop.add_argument("--url", help="the router of the one that is meant, where there are several")
    stop.add_argument("--now", action="store_true", help="let nothing finish")
    stop.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="how long to wait; default: 120")
    stop.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cluster.ray_session.folders import living
    from cluster.ray_session.running import clusters

    found = [each for each in clusters() if args.url is None or args.url.rstrip("/") in each.urls]
    if not found:
        raise InvalidConfig("no cluster of this user runs on this host" + (f" at {args.url}" if args.url else ""))
    if len(found) > 1:
        choice = ", ".join(each.urls[0] if each.urls else f"process {each.pid}" for each in found)
        raise InvalidConfig(f"several clusters run on this host; choose one with --url: {choice}")
    (cluster,) = found
    deadline = time.monotonic() + args.timeout
    with suppress(ProcessLookupError):
        os.kill(cluster.pid, signal.SIGTERM)
        if args.now:
            time.sleep(_POLL_S)  # two signals that come at once are one
            os.kill(cluster.pid, signal.SIGTERM)
    while cluster.folder in living() or os.path.exists(cluster.folder):
        if time.monotonic() >= deadline:
            raise StopTimeout(f"process {cluster.pid} still runs after {args.timeout:g} s; `baton stop --now` ends it")
        time.sleep(_POLL_S)
    print(f"stopped {cluster.urls[0] if cluster.urls else f'process {cluster.pid}'}")
    return 0
