"""Flags that several subcommands share, and how they become a ClusterConfig with absolute paths."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from workers.errors import InvalidConfig

if TYPE_CHECKING:
    from cluster.config import ClusterConfig

INTERRUPTED = 130
"""The exit code of a command that a signal ended."""
OPERATOR_ERROR = 2
"""The exit code of an error that has none of its own."""
DEFAULT_MODEL = Path("models/ernie-4.5-tiny")
DEFAULT_URL = "http://127.0.0.1:8000"
_ALIAS = "alias:"
_URL_HELP = f"the router; default: $BATON_URL, else this host's cluster, else {DEFAULT_URL}"
KEYS = {"api": "BATON_API_KEY", "admin": "BATON_ADMIN_KEY"}
"""Variables of the environment that hold a key of each kind."""


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
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="checkpoint folder, or OWNER/NAME on the Hugging Face Hub; default: models/ernie-4.5-tiny",
    )
    parser.add_argument("--dtype", help="type of weights and KV: float32 or bfloat16; default: float32")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads per worker; default: 1")
    parser.add_argument("--store", metavar="URL", help="memory (default) or redis://HOST:PORT/DB")


def add_router_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen on; default: 127.0.0.1")
    parser.add_argument("--port", type=int, help="HTTP port; default: 8000; 0: any free one")
    for kind, what in (("api", "clients must send one of its keys"), ("admin", "keys for /admin")):
        parser.add_argument(
            f"--{kind}-key-file",
            type=Path,
            metavar="FILE",
            help=f"{what}, one a line; default: ${KEYS[kind]}, else none",
        )
    parser.add_argument("--api-key", action=_NoKeyHere, help=argparse.SUPPRESS)
    parser.add_argument(
        "--insecure", action="store_true", default=None, help="serve other hosts without API keys (not /admin)"
    )


def add_aliases(parser: argparse.ArgumentParser) -> None:
    """Names that vLLM and FastDeploy have for settings; docs/aliases.md lists them."""
    from cluster.aliases import ALIASES

    for alias in ALIASES:
        names = [
            f"--{alias.name}",
            *([f"--{alias.keyword}"] if "-" in alias.name else []),
            *filter(None, [alias.short]),
        ]
        kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if alias.is_switch else {}
        if alias.is_switch:
            names = names[:1]
        parser.add_argument(*names, dest=f"{_ALIAS}{alias.keyword}", default=None, help=argparse.SUPPRESS, **kind)


def _aliases(args: Mapping[str, Any]) -> dict[str, Any]:
    """Those that were given, by keyword."""
    return {name.removeprefix(_ALIAS): value for name, value in args.items() if name.startswith(_ALIAS)}


def add_key_file(parser: argparse.ArgumentParser, kind: str) -> None:
    """For a command that sends keys of several kinds."""
    parser.add_argument(
        f"--{kind}-key-file", type=Path, metavar="FILE", help=f"its first key is sent; default: ${KEYS[kind]}"
    )


def first_key(args: argparse.Namespace, kind: str, environment: Mapping[str, str] = os.environ) -> str:
    """The key of a kind to send; empty: none was given."""
    return next(iter(_keys(vars(args), kind, environment)), "")


def add_client_flags(parser: argparse.ArgumentParser) -> None:
    """What every command that talks to a running router takes."""
    parser.add_argument("--url", help=_URL_HELP)
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="its first key is sent; default: $BATON_API_KEY"
    )
    parser.add_argument("--api-key", action=_NoKeyHere, help=argparse.SUPPRESS)


def add_admin_flags(parser: argparse.ArgumentParser) -> None:
    """What every command that asks /admin takes."""
    parser.add_argument("--url", help=_URL_HELP)
    parser.add_argument(
        "--admin-key-file", type=Path, metavar="FILE", help="its first key is sent; default: $BATON_ADMIN_KEY"
    )
    parser.add_argument("--api-key", action=_NoKeyHere, help=argparse.SUPPRESS)


class _NoKeyHere(argparse.Action):
    """Refuses a key on the command line, and says where it belongs."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> NoReturn:
        parser.error(
            "every user of this host can read a command line: put the key into a file (--api-key-file, --admin-key-file) "
            "or the environment (BATON_API_KEY, BATON_ADMIN_KEY)"
        )


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line; blank lines and those that begin with # are passed over. Raises InvalidConfig."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"cannot read the keys in {path}: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise InvalidConfig(f"there is no key in {path}; write one a line")
    return keys


def _keys(args: Mapping[str, Any], kind: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    path = args.get(f"{kind}_key_file")
    if path is not None:
        return read_keys(path)
    return (environment[KEYS[kind]],) if environment.get(KEYS[kind]) else ()


def client_target(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """URL, without a slash at its end, and the key to send ("": none): an admin key for commands that ask /admin."""
    url = args.url or environment.get("BATON_URL") or _url_of_this_host()
    if not url.startswith(("http://", "https://")):
        raise InvalidConfig(f"--url must start with http:// or https://; it is {url!r}")
    kind = "admin" if hasattr(args, "admin_key_file") else "api"
    return url.rstrip("/"), next(iter(_keys(vars(args), kind, environment)), "")


def _url_of_this_host() -> str:
    """Where the only cluster of this user listens; DEFAULT_URL where there is none. Raises InvalidConfig when there are several."""
    from cluster.ray_session.running import clusters

    urls = [each.urls[0] for each in clusters() if each.urls]
    if len(urls) > 1 and DEFAULT_URL not in urls:
        raise InvalidConfig(f"several clusters run on this host; choose one with --url: {', '.join(urls)}")
    return urls[0] if len(urls) == 1 else DEFAULT_URL


def settings(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Dotted settings of the common flags; None for those not given."""
    from cluster.aliases import read_dtype

    given = vars(args)
    return {
        "worker.model": args.model,
        "worker.dtype": None if args.dtype is None else read_dtype(args.dtype),
        "worker.num_threads": args.threads,
        "store.url": args.store,
        "router.host": given.get("host"),
        "router.port": given.get("port"),
        "router.api.api_keys": _keys(given, "api", environment) or None,
        "router.api.admin_keys": _keys(given, "admin", environment) or None,
        "router.api.insecure": given.get("insecure"),
        "pools.prefill": given.get("prefill"),
        "pools.decode": given.get("decode"),
        "pools.mixed": given.get("mixed"),
        "pools.routers": given.get("routers"),
        "pools.share_port": True if given.get("routers") else None,
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


def _fetched(config: ClusterConfig) -> ClusterConfig:
    """With the folder of a model that is named as a repository, which keeps its name for clients. Raises InvalidConfig."""
    from cluster.hub import fetch, is_repository

    name = config.worker.model
    if not is_repository(name):
        return config
    folder = fetch(name, config.hub)
    worker = replace(config.worker, model=folder, served_model_name=config.worker.served_model_name or name)
    router = replace(config.router, model=folder) if config.router.model == name else config.router
    return replace(config, worker=worker, router=router)


def config_from(
    args: argparse.Namespace, environment: Mapping[str, str] = os.environ, **defaults: Any
) -> ClusterConfig:
    """File, environment, flags and --set together; `defaults` (dots written as __) apply to flags that were not given.

    The model's path is made absolute here, because the actors that load it run in other folders. Raises InvalidConfig.
    """
    from cluster.aliases import BLOCKS, check_kv_dtype, kv_bytes, settings_of
    from cluster.config import load_config, read_file  # torch-free, but slower than a parser needs
    from cluster.hub import is_repository
    from cluster.settings import from_environment
    from cluster.store.store import has_credentials

    shown = [text for text in args.assignments if "_keys" in text.partition("=")[0]]
    if shown:
        name = shown[0].partition("=")[0]
        raise InvalidConfig(f"every user of this host can read a command line: set {name} in a file or the environment")
    aliases = _aliases(vars(args))
    laid, notes = settings_of(aliases)
    flags = laid | {name: value for name, value in settings(args, environment).items() if value is not None}
    for note in notes:
        print(f"baton: {note}", file=sys.stderr)
    for name, value in defaults.items():
        dotted = name.replace("__", ".")
        if flags.get(dotted) is None:
            flags[dotted] = value
    in_file = read_file(args.config) if args.config else {}
    worker = in_file.get("worker")
    assigned = {text.partition("=")[0]: text.partition("=")[2] for text in args.assignments}
    model = assigned.get("worker.model") or args.model or from_environment(environment).get("worker.model")
    if model is None and isinstance(worker, dict) and worker.get("model"):
        # A relative path in a file is meant from that file's folder.
        named = str(worker["model"])
        beside = args.config.parent / named
        model = named if is_repository(named) and not beside.exists() else beside
    for given in (flags.get("store.url"), assigned.get("store.url")):
        if given and has_credentials(given):
            raise InvalidConfig(
                "a password on the command line can be read by everybody on this host: put it into a file "
                "(--set store.password_file=PATH), or the whole URL into BATON__STORE__URL"
            )
    if model is not None and is_repository(str(model)):
        flags["worker.model"] = str(model)
    else:
        flags["worker.model"] = str(Path(model).expanduser().resolve()) if model else find_default_model()
    assignments = [text for text in args.assignments if not text.startswith("worker.model=")]
    config = _fetched(load_config(args.config, flags, assignments, environment))
    check_kv_dtype(aliases, config.worker.dtype)
    if (blocks := aliases.get(BLOCKS.replace("-", "_"))) is not None:
        worker = config.worker
        size = kv_bytes(worker.model, worker.dtype, worker.parallel.tensor_parallel, blocks)
        config = replace(config, worker=replace(worker, kv_memory_bytes=size))
    if environment is os.environ:
        for name in [name for name in os.environ if name in KEYS.values() or name.startswith("BATON__")]:
            del os.environ[name]  # the processes that this one starts need no keys
    return config
