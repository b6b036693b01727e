"""`baton version` and `baton config-schema`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=run_version)
    schema = commands.add_parser("config-schema", help="print the JSON Schema of configuration files")
    schema.set_defaults(run=run_schema)


def run_version(args: argparse.Namespace) -> int:
    try:
        version = importlib.metadata.version("baton-serve")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown: baton-serve is not installed"
    print(f"baton {version}")
    return 0


def run_schema(args: argparse.Namespace) -> int:
    from cluster.config import schema

    print(json.dumps(schema(), indent=2, ensure_ascii=False))
    return 0
