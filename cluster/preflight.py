"""Checks, before anything is started, what would otherwise fail minutes later and deep inside: model, ports, memory, Redis."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.ray_session.session import port_is_free
from cluster.store.store import StoreConfig, StoreUnavailable
from router.sampling_defaults import load_sampling_defaults
from workers.config import WorkerConfig
from workers.errors import BatonError, InvalidConfig
from workers.machine.limits import available_bytes, raise_file_limit
from workers.machine.native_build import not_ours_alone
from workers.machine.processors import Processors
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weight_files import check_dimensions, read_header, weight_files
from workers.model.parallel.layout import check
from workers.text.tokenizer import Tokenizer

PROCESS_BYTES = 400 * 2**20
"""Python with torch, before any weight."""
RAY_BYTES = 700 * 2**20
"""Ray with its dashboard on one host."""
_OTHER_FILES = 256
"""Of a process beside its clients' connections: libraries, streams to workers, Ray's sockets."""


def check_model(path: str) -> None:
    """Raises InvalidConfig unless `path` is a folder with a checkpoint that a worker could load.

    It reads what a worker reads, with the same code, but for the weights themselves.
    """
    folder = _folder(path)
    with _reading(folder / "config.json"):
        dimensions = ErnieConfig.load(folder)
    with _reading(folder / "model.safetensors.index.json"):
        files = weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with _reading(file):
            shapes |= {name: stored.shape for name, stored in read_header(file).items()}
    check_dimensions(dimensions, shapes, folder)
    check_tokenizer(path)


def check_tokenizer(path: str) -> None:
    """Raises InvalidConfig unless `path` is a folder with what a router reads: tokenizer, chat template, sampling defaults."""
    folder = _folder(path)
    with _reading(folder / "tokenizer.json"):
        Tokenizer.check(folder)
    with _reading(folder / "generation_config.json"):
        load_sampling_defaults(folder)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns what a reader stumbles over in a file that nobody thought of into InvalidConfig, which names the file."""
    try:
        yield
    except BatonError:
        raise
    except Exception as error:
        raise InvalidConfig(
            f"{file} is not as a checkpoint's should be ({type(error).__name__}: {error}); is its download complete?"
        ) from error


def _folder(path: str) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    hint = "that is a file" if folder.exists() else "there is no such folder"
    raise InvalidConfig(f"cannot find the model {path!r}: {hint}; give the path of a checkpoint folder with --model")


def check_layout(config: WorkerConfig) -> None:
    """Raises InvalidConfig when the model cannot be spread over ranks as worker.parallel asks."""
    if config.parallel.size > 1:
        check(config.parallel, ErnieConfig.load(Path(config.model)))


def check_processors(config: ClusterConfig) -> None:
    """Raises InvalidConfig when a worker that starts on this host could not have its processors."""
    if not config.ray.address:
        for name, _ in config.pools.workers:
            Processors.of(config.worker_named(name).cpus)


def check_gpus(config: ClusterConfig) -> None:
    """Raises InvalidConfig when the ranks of a worker would not get a GPU each."""
    worker = config.worker
    if worker.parallel.size == 1 or worker.device == "cpu":
        return
    if config.ray.worker_gpus < 1:
        raise InvalidConfig(
            f"ray.worker_gpus {config.ray.worker_gpus:g} would put several ranks of a worker on one GPU, which NCCL refuses; "
            "set it to 1"
        )
    if worker.device != "cuda":
        raise InvalidConfig(
            f"worker.device {worker.device!r} is one GPU, and worker.parallel asks for {worker.parallel.size} ranks: "
            "set it to cuda, as Ray shows each rank a GPU of its own"
        )


def check_port(host: str, port: int, setting: str) -> None:
    """Raises InvalidConfig when nobody could listen there."""
    try:
        free = port == 0 or port_is_free(host, port)
    except OSError as error:
        raise InvalidConfig(
            f"{host!r} is not an address of this machine ({error.strerror or error}); choose another --host"
        ) from error
    if not free:
        raise InvalidConfig(f"port {port} on {host} is in use; stop what listens there or choose another ({setting})")


def check_memory(config: ClusterConfig, free_bytes: int | None = None) -> None:
    """Raises InvalidConfig when the workers of this host would not fit into its memory."""
    available = available_bytes() if free_bytes is None else free_bytes
    count = len(config.pools.workers)
    worker = config.worker
    each = worker.parallel.size * (PROCESS_BYTES + worker.kv_memory_bytes)
    each += weight_bytes(worker) + max(0, worker.kv_host_bytes)
    needed = count * each + RAY_BYTES + config.ray.object_store_bytes
    if needed > available:
        raise InvalidConfig(
            f"{count} workers need about {_gib(needed)} of memory and {_gib(available)} is free; "
            "start fewer (--prefill, --decode, --mixed), use --dtype bfloat16, or a smaller worker.kv_memory_bytes"
            + (" or worker.kv_host_bytes" if worker.kv_host_bytes > 0 else "")
        )


def file_limit_warning(config: ClusterConfig) -> str:
    """A warning where a router may not open a file for each of its connections, else empty. Raises this process's own limit."""
    needed = config.router.max_running + config.router.max_queue + _OTHER_FILES
    limit = raise_file_limit()
    if limit >= needed:
        return ""
    return (
        f"a process may open {limit} files here, and a router with router.max_running + router.max_queue connections needs "
        f"{needed}: further clients will not get a connection; raise it with `ulimit -n {needed}`, or lower router.max_queue"
    )


def check_disk_tier(config: WorkerConfig, num_workers: int) -> None:
    """Raises InvalidConfig when the workers of this host could not keep KV blocks where they are told to."""
    if not config.kv_disk_folder:
        return
    folder = Path(config.kv_disk_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if reason := not_ours_alone(folder):
            raise InvalidConfig(f"worker.kv_disk_folder {reason}")
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InvalidConfig(
            f"worker.kv_disk_folder {str(folder)!r} cannot be written to: {error.strerror}; name a folder that can"
        ) from error
    kept = sum(file.stat().st_size for file in folder.glob("*/*.kv"))
    needed = num_workers * config.kv_disk_bytes
    if needed > free + kept:
        raise InvalidConfig(
            f"{num_workers} workers may keep {_gib(needed)} of KV blocks in {str(folder)!r}, where {_gib(free + kept)} is free; "
            "lower worker.kv_disk_bytes or name another worker.kv_disk_folder"
        )


def check_cache_folder(config: WorkerConfig) -> None:
    """Raises InvalidConfig when somebody else could put code where compiled kernels are loaded from."""
    if config.cache_folder and (reason := not_ours_alone(Path(config.cache_folder))):
        raise InvalidConfig(f"worker.cache_folder {reason}")


async def check_store(config: StoreConfig) -> None:
    """Raises InvalidConfig when the configured Redis does not answer."""
    if config.url == "memory":
        return
    from cluster.store.open import cluster_secret, redis_options
    from cluster.store.redis_store import RedisStore

    if config.secret_file:
        cluster_secret(config)
    for path, setting in (
        (config.ca_file, "store.ca_file"),
        (config.cert_file, "store.cert_file"),
        (config.key_file, "store.key_file"),
    ):
        if path and not Path(path).is_file():
            raise InvalidConfig(f"{setting} {path!r} is no file")
    store = RedisStore(config.url, config.cluster, options=redis_options(config))
    try:
        await store.check()
    except StoreUnavailable as error:
        raise InvalidConfig(f"{error}; start it, or correct --store") from error
    finally:
        await store.close()


def weight_bytes(config: WorkerConfig) -> int:
    """The size of a worker's weights in memory, over all its ranks, from the files' headers and the configured dtype."""
    size = 4 if config.dtype == "float32" else 2
    parallel = config.parallel
    total = experts = 0
    for file in weight_files(Path(config.model)):
        for name, stored in read_header(file).items():
            elements = math.prod(stored.shape)
            total += elements
            experts += elements if ".experts." in name else 0
    # experts are there once, the rest once for every run of ranks that shares it
    return (experts + (total - experts) * (parallel.size // parallel.tensor_parallel)) * size


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
