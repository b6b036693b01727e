"""From the flags of a command to a ClusterConfig with absolute paths."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cluster.commands.flags import find_default_model, settings
from cluster.config import ClusterConfig, load_config, read_file


def config_from(args: argparse.Namespace, **defaults: Any) -> ClusterConfig:
    """File, flags and --set together; `defaults` (dots written as __) apply to flags that were not given.

    The model's path is made absolute here, because the actors that load it run in other folders. Raises InvalidConfig.
    """
    flags = settings(args)
    for name, value in defaults.items():
        dotted = name.replace("__", ".")
        if flags.get(dotted) is None:
            flags[dotted] = value
    in_file = read_file(args.config) if args.config else {}
    worker = in_file.get("worker")
    assigned = {text.partition("=")[0]: text.partition("=")[2] for text in args.assignments}
    model = assigned.get("worker.model") or flags["worker.model"]
    if model is None and isinstance(worker, dict) and worker.get("model"):
        # A relative path in a file is meant from that file's folder.
        model = args.config.parent / str(worker["model"])
    flags["worker.model"] = str(Path(model).expanduser().resolve()) if model else find_default_model()
    assignments = [text for text in args.assignments if not text.startswith("worker.model=")]
    return load_config(args.config, flags, assignments)
