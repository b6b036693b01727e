"""Sizes and opens the lower tiers that a WorkerConfig asks for; decides nothing afterwards."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from workers.config import WorkerConfig
from workers.errors import InvalidConfig
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.kv_tiers.folder import BlockFolder, Format, fingerprint_bytes
from workers.kv_tiers.tiers import KvTiers
from workers.machine.limits import available_bytes
from workers.machine.pressure import MemoryWatch

_POOLS = 4
_MEMORY_SHARE = 20
"""The automatic host tier holds four pools, but at most a twentieth of the available memory: eight workers may share a host."""


def open_tiers(config: WorkerConfig, memory: KvMemory, fingerprint: str, worker_id: str) -> KvTiers | None:
    """None when there are none. Raises InvalidConfig when the folder cannot be used, or a tier holds not even one block."""
    layout = memory.layout
    num_host_blocks = host_bytes(config, layout) // layout.block_bytes
    if config.kv_host_bytes > 0 and num_host_blocks == 0:
        raise InvalidConfig(f"worker.kv_host_bytes is {config.kv_host_bytes}; one KV block has {layout.block_bytes}")
    watch = MemoryWatch("prefix blocks that the pool evicts are dropped", config.min_free_bytes)
    if not config.kv_disk_folder:
        return KvTiers(memory, num_host_blocks, watch=watch) if num_host_blocks else None
    form = Format(fingerprint_bytes(fingerprint), layout.block_size, layout.block_bytes)
    num_disk_blocks = config.kv_disk_bytes // form.file_bytes
    if num_disk_blocks == 0:
        raise InvalidConfig(f"worker.kv_disk_bytes is {config.kv_disk_bytes}; one KV block needs {form.file_bytes}")
    folder = BlockFolder(Path(config.kv_disk_folder) / quote(worker_id, safe=""), form)
    return KvTiers(memory, num_host_blocks, folder, num_disk_blocks, watch)


def host_bytes(config: WorkerConfig, layout: KvLayout) -> int:
    """The size of the host tier."""
    if config.kv_host_bytes >= 0:
        return config.kv_host_bytes
    if config.device == "cpu" or config.parallel.size > 1 or not config.prefix_cache:
        return 0
    return min(_POOLS * layout.pool_bytes, available_bytes() // _MEMORY_SHARE)
