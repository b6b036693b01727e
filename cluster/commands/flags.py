"""Flags that several subcommands share, and how they become a ClusterConfig with absolute paths."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.errors import InvalidConfig

if TYPE_CHECKING:
    from cluster.config import ClusterConfig

DEFAULT_MODEL = Path("models/ernie-4.5-tiny")
DEFAULT_URL = "http://127.0.0.1:8000"


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """What every command that starts something takes."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML, JSON or TOML; flags win over it")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="NAME=VALUE",
        help="any setting, such as worker.max_num_seqs=32; may be repeated; `baton config-schema` lists them; the environment's BATON__WORKER__MAX_NUM_SEQS=32 says the same",
    )
    parser.add_argument("--model", metavar="FOLDER", help="checkpoint folder; default: models/ernie-4.5-tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="type of weights and KV; default: float32")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads per worker; default: 1")
    parser.add_argument("--store", metavar="URL", help="memory (default) or redis://HOST:PORT/DB")


def add_router_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen on; default: 127.0.0.1")
    parser.add_argument("--port", type=int, help="HTTP port; default: 8000; 0: any free one")
    parser.add_argument(
        "--api-key",
        action="append",
        dest="api_keys",
        metavar="KEY",
        help="clients must send one of these; default: $BATON_API_KEY, else none is asked for",
    )


def add_client_flags(parser: argparse.ArgumentParser) -> None:
    """What every command that talks to a running router takes."""
    parser.add_argument("--url", help=f"the router; default: $BATON_URL, else this host's cluster, else {DEFAULT_URL}")
    parser.add_argument("--api-key", metavar="KEY", help="default: $BATON_API_KEY")


def client_target(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """URL, without a slash at its end, and API key ("": none)."""
    url = args.url or environment.get("BATON_URL") or _url_of_this_host()
    if not url.startswith(("http://", "https://")):
        raise InvalidConfig(f"--url must start with http:// or https://; it is {url!r}")
    return url.rstrip("/"), args.api_key or environment.get("BATON_API_KEY") or ""


def _url_of_this_host() -> str:
    """Where the only cluster of this user listens; DEFAULT_URL where there is none. Raises InvalidConfig when there are several."""
    from cluster.running import clusters

    urls = [each.urls[0] for each in clusters() if each.urls]
    if len(urls) > 1 and DEFAULT_URL not in urls:
        raise InvalidConfig(f"several clusters run on this host; choose one with --url: {', '.join(urls)}")
    return urls[0] if len(urls) == 1 else DEFAULT_URL


def settings(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Dotted settings of the common flags; None for those not given."""
    given = vars(args)
    keys = given.get("api_keys") or ([environment["BATON_API_KEY"]] if environment.get("BATON_API_KEY") else None)
    return {
        "worker.model": args.model,
        "worker.dtype": args.dtype,
        "worker.num_threads": args.threads,
        "store.url": args.store,
        "router.host": given.get("host"),
        "router.port": given.get("port"),
        "router.api.api_keys": keys,
        "pools.prefill": given.get("prefill"),
        "pools.decode": given.get("decode"),
        "pools.mixed": given.get("mixed"),
        "ray.dashboard": given.get("dashboard"),
        "ray.address": given.get("ray_address"),
    }


def find_default_model() -> str:
    """The shipped checkpoint: in the current folder, else beside the installed packages. Raises InvalidConfig."""
    places = (Path.cwd(), Path(__file__).resolve().parents[2])
    for place in places:
        if (place / DEFAULT_MODEL).is_dir():
            return str(place / DEFAULT_MODEL)
    raise InvalidConfig(f"there is no {DEFAULT_MODEL} here; give the path of a checkpoint folder with --model")


def config_from(
    args: argparse.Namespace, environment: Mapping[str, str] = os.environ, **defaults: Any
) -> ClusterConfig:
    """File, environment, flags and --set together; `defaults` (dots written as __) apply to flags that were not given.

    The model's path is made absolute here, because the actors that load it run in other folders. Raises InvalidConfig.
    """
    from cluster.config import load_config, read_file  # torch-free, but slower than a parser needs
    from cluster.settings import from_environment
    from cluster.store.store import has_credentials

    flags = settings(args, environment)
    for name, value in defaults.items():
        dotted = name.replace("__", ".")
        if flags.get(dotted) is None:
            flags[dotted] = value
    in_file = read_file(args.config) if args.config else {}
    worker = in_file.get("worker")
    assigned = {text.partition("=")[0]: text.partition("=")[2] for text in args.assignments}
    model = assigned.get("worker.model") or flags["worker.model"] or from_environment(environment).get("worker.model")
    if model is None and isinstance(worker, dict) and worker.get("model"):
        # A relative path in a file is meant from that file's folder.
        model = args.config.parent / str(worker["model"])
    for given in (flags["store.url"], assigned.get("store.url")):
        if given and has_credentials(given):
            raise InvalidConfig(
                "a password on the command line can be read by everybody on this host: put it into a file "
                "(--set store.password_file=PATH), or the whole URL into BATON__STORE__URL"
            )
    flags["worker.model"] = str(Path(model).expanduser().resolve()) if model else find_default_model()
    assignments = [text for text in args.assignments if not text.startswith("worker.model=")]
    return load_config(args.config, flags, assignments, environment)
