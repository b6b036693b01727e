"""`baton version` and `baton config-schema`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from typing import Any, NoReturn


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=run_version)
    schema = commands.add_parser("config-schema", help="print the JSON Schema of configuration files")
    schema.set_defaults(run=run_schema)


class ShowVersion(argparse.Action):
    """`baton --version`."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> NoReturn:
        print(version_text())
        parser.exit()


def version_text() -> str:
    """With the commit, where the image says it."""
    try:
        version = importlib.metadata.version("baton-serve")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown: baton-serve is not installed"
    commit = os.environ.get("BATON_COMMIT")
    return f"baton {version}" + (f" ({commit})" if commit else "")


def run_version(args: argparse.Namespace) -> int:
    print(version_text())
    return 0


def run_schema(args: argparse.Namespace) -> int:
    from cluster.config import schema

    print(json.dumps(schema(), indent=2, ensure_ascii=False))
    return 0
