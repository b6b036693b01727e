"""`baton serve`: a whole cluster on this host (or in a running Ray), until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cluster.commands.detaching import Detached, detach, log_file
from cluster.commands.flags import add_aliases, add_cluster_flags, add_router_flags, config_from
from cluster.console.output import StepPrinter
from workers.errors import InvalidConfig

if TYPE_CHECKING:
    from cluster.config import ClusterConfig
    from cluster.lifecycle import Cluster


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "serve",
        help="start workers and a router",
        description="Starts prefill, decode and mixed workers and a router, and serves until Ctrl-C.",
        epilog="Flags that vLLM and FastDeploy have, such as --max-model-len, are taken too: docs/aliases.md.",
    )
    parser.add_argument("--prefill", type=int, metavar="N", help="prefill workers; default: 1")
    parser.add_argument("--decode", type=int, metavar="N", help="decode workers; default: 1")
    parser.add_argument("--mixed", type=int, metavar="N", help="workers that do both; default: 0")
    parser.add_argument("--routers", type=int, metavar="N", help="routers, which share the port; default: 1")
    add_router_flags(parser)
    parser.add_argument(
        "--dashboard",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the Ray dashboard, which asks for a token; default: off",
    )
    parser.add_argument(
        "--detach",
        action="store_true",
        help="return once the cluster serves; `baton stop` ends it, `baton status` finds it",
    )
    parser.add_argument("--ray-address", metavar="ADDRESS", help="place the actors in a running Ray: auto or HOST:PORT")
    add_cluster_flags(parser)
    add_aliases(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    detached = detach() if args.detach else None
    if isinstance(detached, int):
        return detached
    from cluster.commands.running import run_until_stopped
    from cluster.ray_session.folders import make_folder

    config = config_from(args)
    if detached and config.ray.address:
        raise InvalidConfig("--detach keeps a Ray of its own; with --ray-address use a supervisor, such as systemd")
    progress = StepPrinter()
    folder = "" if config.ray.address else make_folder()

    return run_until_stopped(_serve(config, progress, folder, detached), folder, progress)


async def _serve(config: ClusterConfig, progress: StepPrinter, folder: str, detached: Detached | None) -> int:
    from cluster.commands.running import tell_changes
    from cluster.lifecycle import launched
    from cluster.store.open import open_store

    async with launched(config, progress, folder) as cluster:

        def announce() -> None:
            log = log_file(urlsplit(cluster.url).port or 0) if detached else None
            print(banner(cluster, log), flush=True)
            if detached and log:
                detached.serves(log)

        store = open_store(cluster.config.store, cluster.config.ray.namespace, progress.say)
        with suppress(asyncio.CancelledError):
            telling = tell_changes(store, cluster.config.store.lease_ttl_s, progress, announce)
            await cluster.until_ray_dies(telling, progress.say)
    return 0


def example_request(url: str, is_chat: bool, needs_key: bool) -> str:
    """A curl command that works as it stands where $BATON_API_KEY holds a key: the key itself would end up in logs."""
    path, body = "completions", json.dumps({"prompt": "Hello", "max_tokens": 32})
    if is_chat:
        path = "chat/completions"
        body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
    key = ' -H "Authorization: Bearer $BATON_API_KEY"' if needs_key else ""
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def has_chat_template(model: str) -> bool:
    from workers.text.tokenizer import Tokenizer

    return Tokenizer.load(model).has_chat_template


def banner(cluster: Cluster, log: Path | None = None) -> str:
    """Where to go from here. With `log` nobody's Ctrl-C will reach the cluster."""
    config = cluster.config
    url = cluster.url
    curl = example_request(url, has_chat_template(config.router.model), bool(config.router.api.api_keys))
    pools = ", ".join(f"{name}" for name in cluster.workers)
    lines = [
        "",
        f"Baton serves {config.worker.served_model_name or config.worker.model.rpartition('/')[2]}",
        f"  API            {'  '.join(f'{each}/v1' for each in cluster.urls)}",
        f"  workers        {pools}",
        f"  operators      {'  '.join(f'{each}/admin/ui' for each in cluster.urls)}",
    ]
    if cluster.session.dashboard_url:
        lines.append(f"  Ray dashboard  {cluster.session.dashboard_url}")
    lines.append(f"  Ray            {cluster.session.address}")
    if cluster.session.token_file:
        lines.append(f"  Ray's token    in {cluster.session.token_file}")
    end = (
        f"`baton stop` stops it; what it has to say is in {log}."
        if log
        else "Ctrl-C stops it; a second one stops it at once."
    )
    lines += ["", f"  {curl}", "", end, ""]
    return "\n".join(lines)
