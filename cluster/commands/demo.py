"""`baton demo`: starts a cluster, asks one question per skill, shows who computed what, and stops it."""

from __future__ import annotations

import argparse
import asyncio
import secrets
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.commands.flags import add_cluster_flags, config_from
from cluster.console.progress import Progress

if TYPE_CHECKING:
    from cluster.config import ClusterConfig
    from cluster.demo import Question


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="start a cluster, ask it one question per skill, stop it",
        description="Starts a cluster on a free port, asks one held-out question per skill of the model, stops it. "
        "Exit code 1: an answer was wrong.",
    )
    parser.add_argument("--json", action="store_true", help="the results as JSON")
    parser.add_argument("--prefill", type=int, metavar="N", help="prefill workers; default: 1")
    parser.add_argument("--decode", type=int, metavar="N", help="decode workers; default: 1")
    parser.add_argument("--mixed", type=int, metavar="N", help="workers that do both; default: 0")
    parser.add_argument(
        "--dashboard", action=argparse.BooleanOptionalAction, default=None, help="the Ray dashboard; default: off"
    )
    add_cluster_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from cluster.commands.signals import run_until_stopped
    from cluster.demo import read_questions
    from cluster.preflight import check_model
    from cluster.ray_session.folders import make_folder

    # Its prompts are short: an idle decode worker would compute them itself, and there would be no handoff to show.
    config = config_from(args, router__port=0, ray__dashboard=False, router__max_local_prefill_tokens=0)
    check_model(config.worker.model)
    questions = read_questions(Path(config.worker.model))
    progress = Progress()
    folder = "" if config.ray.address else make_folder()
    return run_until_stopped(_demo(config, questions, args.json, progress, folder), folder, progress)


async def _demo(
    config: ClusterConfig, questions: tuple[Question, ...], as_json: bool, progress: Progress, folder: str
) -> int:
    from cluster.demo import ask, results_json, results_table
    from cluster.lifecycle import launched

    api_key = secrets.token_urlsafe()  # of the configured keys only hashes are known
    api = replace(config.router.api, api_keys=(*config.router.api.api_keys, api_key))
    config = replace(config, router=replace(config.router, api=api))
    async with launched(config, progress, folder) as cluster:
        with progress.step(f"asking {len(questions)} questions"):
            results = await asyncio.to_thread(ask, cluster.url, api_key, questions)
    print(results_json(results) if as_json else results_table(results))
    return 0 if all(result.right for result in results) else 1
