"""`baton ray head` and `baton ray node`: Ray's own processes in containers or on hosts of their own, with Baton's settings and a token."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

from cluster.commands.flags import add_cluster_flags, config_from
from cluster.console.output import StepPrinter

if TYPE_CHECKING:
    from cluster.ray_session.node import NodePlan

DEFAULT_PORT = 6379


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "ray",
        help="run a Ray head or node in this container",
        description="Runs Ray's processes for workers in other containers or on other hosts, until SIGTERM or Ctrl-C.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION", title="actions")
    head = actions.add_parser(
        "head",
        help="what the others join",
        description="Ray's head. With a store in Redis its tables are kept there, and a new head goes on from them.",
    )
    head.add_argument(
        "--port",
        dest="gcs_port",
        type=int,
        default=DEFAULT_PORT,
        metavar="PORT",
        help=f"of Ray's GCS; default: {DEFAULT_PORT}",
    )
    head.add_argument("--dashboard", action=argparse.BooleanOptionalAction, default=None, help="Ray's dashboard")
    head.add_argument("--dashboard-host", metavar="ADDRESS", help="where the dashboard listens; default: --host")
    head.set_defaults(run=run_head)
    node = actions.add_parser(
        "node", help="room for ranks of workers", description="A further node, on which Ray places ranks of workers."
    )
    node.add_argument("--ray-address", required=True, metavar="HOST:PORT", help="of the head")
    node.set_defaults(run=run_node)
    for action in (head, node):
        action.add_argument("--host", dest="node_host", required=True, help="this container's address for the others")
        add_probe_flag(action)
        add_cluster_flags(action)


def add_probe_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--probe-port", type=int, default=0, metavar="PORT", help="serve /health and /ready there; default: nowhere"
    )


def run_head(args: argparse.Namespace) -> int:
    from cluster.ray_session.node import plan_head

    config = config_from(args)
    plan = plan_head(config, args.node_host, args.gcs_port, args.dashboard_host or "")
    return _run(plan, args, "Ray's head", config.start_timeout_s)


def run_node(args: argparse.Namespace) -> int:
    from cluster.ray_session.node import plan_member

    config = config_from(args)
    return _run(plan_member(config.ray, args.node_host), args, "a node of Ray", config.start_timeout_s)


def _run(plan: NodePlan, args: argparse.Namespace, what: str, timeout_s: float) -> int:
    from cluster.commands.running import run_until_stopped

    progress = StepPrinter()
    return run_until_stopped(_keep(plan, args.node_host, args.probe_port, what, timeout_s, progress), "", progress)


async def _keep(plan: NodePlan, host: str, port: int, what: str, timeout_s: float, progress: StepPrinter) -> int:
    """Stays with the node until cancelled. Raises RayDied when it ends by itself."""
    from contextlib import AsyncExitStack, closing

    from cluster.probes import Probes, ProbeServer
    from cluster.ray_session.node import running_node
    from cluster.steps import bounded

    probes = Probes()
    async with AsyncExitStack() as stack:
        stack.enter_context(closing(ProbeServer(probes, host, port)))
        with progress.step(f"starting {what} at {host}"):
            started = stack.enter_async_context(running_node(plan))
            node = await bounded(started, timeout_s, f"{what} did not start")
        probes.is_ready = True
        print(f"{what} runs at {host}; Ctrl-C ends it", flush=True)
        alive = asyncio.ensure_future(probes.watch(_nothing))
        try:
            await node.died()
        except asyncio.CancelledError:
            return 0
        finally:
            alive.cancel()
    return 0


async def _nothing() -> None:
    """Ray's processes are watched by their own command; that the event loop turns is what is looked at."""
