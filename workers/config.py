"""The settings of one worker: model, KV pool, batch limits and timeouts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from workers.errors import InvalidConfig
from workers.kv_transfer.transports.negotiate import BEST_FIRST

INSTRUCTION_SETS = ("amx", "avx512bf16", "avx512", "avx2", "neonbf16", "neon")
"""Those that the C++ kernels are written for, better ones first."""

MAX_DIRECT_RANKS = 16
"""torch's device-side exchange (all_to_all_vdev_2d_offset) takes no larger groups."""


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How one worker is spread over a group of ranks; by default it is one rank.

    A group has max(expert_parallel, tensor_parallel) ranks. Attention is data-parallel over expert_parallel /
    tensor_parallel parts of the group, each with its own sequences.
    """

    expert_parallel: int = 1
    """Ranks that share a mixture's experts."""
    tensor_parallel: int = 1
    """Ranks that share the heads and dense feed-forward layers of the same sequences; 1: attention is data-parallel."""
    redundant_experts: int = 0
    """Further copies of busy experts, over the whole group and per layer."""
    ranks_per_node: int = 0
    """Ranks that share a host, which experts' copies are packed into first; 0: the whole group is on one."""
    exact_combine: bool = True
    """Expert outputs travel back one by one and are added as on a single rank, bit for bit. False: each rank adds its own first, which sends less."""
    dispatch: Literal["auto", "all_to_all", "device"] = "auto"
    """How rows reach experts on GPUs: device keeps the number of rows that travel on the GPU (NVSHMEM; a rank that is lost then ends the processes of all), all_to_all asks the host and runs everywhere. auto is all_to_all for now: torch's device operations are reported to race."""
    min_overlap_tokens: int = 0
    """Steps with at least this many tokens run as two halves, one communicating while the other computes; 0: never."""
    rebalance_steps: int = 0
    """Steps between looks at the experts' load; 0: experts move on command only."""
    rebalance_above: float = 1.2
    """Load of the busiest rank over the mean, above which such a look moves experts."""
    heartbeat_timeout_s: float = 5.0
    """A rank that has been silent for this long is lost; ranks speak four times as often."""
    step_timeout_s: float = 120.0
    """A rank that speaks but does not end its step for this long is lost."""
    form_timeout_s: float = 30.0
    """The ranks of a group must have found each other within this time; otherwise they try again."""

    def __post_init__(self) -> None:
        checks = (
            (1 <= self.expert_parallel <= 1024, "expert_parallel", "must be between 1 and 1024"),
            (1 <= self.tensor_parallel <= 64, "tensor_parallel", "must be between 1 and 64"),
            (self.redundant_experts >= 0, "redundant_experts", "must not be negative"),
            (
                self.ranks_per_node >= 0 and self.size % (self.ranks_per_node or self.size) == 0,
                "ranks_per_node",
                f"must be 0 or divide the group's {self.size} ranks",
            ),
            (self.dispatch in ("auto", "all_to_all", "device"), "dispatch", "must be auto, all_to_all or device"),
            (
                self.dispatch != "device" or (self.size <= MAX_DIRECT_RANKS and not self.min_overlap_tokens),
                "dispatch",
                f"must be auto or all_to_all for more than {MAX_DIRECT_RANKS} ranks, and with min_overlap_tokens",
            ),
            (self.min_overlap_tokens >= 0, "min_overlap_tokens", "must not be negative"),
            (self.rebalance_steps >= 0, "rebalance_steps", "must not be negative"),
            (self.rebalance_above >= 1, "rebalance_above", "must be at least 1"),
            (self.heartbeat_timeout_s > 0, "heartbeat_timeout_s", "must be positive"),
            (self.step_timeout_s > 0, "step_timeout_s", "must be positive"),
            (self.form_timeout_s > 0, "form_timeout_s", "must be positive"),
        )
        for ok, name, what in checks:
            if not ok:
                raise InvalidConfig(f"worker.parallel.{name} {what}; it is {getattr(self, name)!r}")

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return max(self.expert_parallel, self.tensor_parallel)

    @property
    def num_nodes(self) -> int:
        return self.size // (self.ranks_per_node or self.size)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Settings of a worker; every bound the worker keeps is here. Sizes in bytes and tokens, times in seconds.

    Raises InvalidConfig on construction when a value cannot work.
    """

    model: str
    """Path of a "-PT" checkpoint folder."""
    served_model_name: str = ""
    """Name in the API; the folder's name when empty."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    device: str = "cpu"
    """cpu, cuda, or cuda:N for the N-th GPU that the process sees."""
    deterministic: bool = True
    """A sequence gets the same bits whatever runs beside it. False, on cuda only, allows kernels that depend on the batch."""
    num_threads: int = 1
    cpus: str = ""
    """Processors of the computing threads, such as "0-3,8" or "numa:0"; their NUMA nodes hold weights and KV. Empty: any."""
    native: bool = True
    """Compute with the C++ kernels, built ahead or else compiled at first use; where neither can be had, or when false, with PyTorch's."""
    instruction_set: str = "auto"
    """Which C++ kernels to run: auto (the best that the processor has), avx2, avx512, avx512bf16, amx, neon or neonbf16."""
    cache_folder: str = ""
    """Where kernels compiled at first use and packed weights are kept; ~/.cache/baton when empty."""
    packed_weights_bytes: int = 0
    """What packed weights may take in cache_folder, those not used for longest going first, so that a restart copies them instead of packing; 0: none are kept. For the C++ kernels, and no group of ranks."""
    max_model_len: int = 0
    """Longest prompt + output; 0: the model's max_position_embeddings."""
    kv_memory_bytes: int = 0
    """Size of the KV pool; 0: kv_memory_fraction of the memory (on cuda, of the GPU, beside the weights) that is free when the worker starts, but at most 64 full-length sequences."""
    kv_memory_fraction: float = 0.2
    max_num_seqs: int = 64
    """Sequences that run at once."""
    max_batch_tokens: int = 512
    """Token budget of one step, prefill chunks and decode tokens together."""
    overlap_steps: bool = True
    """On cuda, schedule and launch a step while the one before it runs. On the cpu, host and device are one."""
    max_queue: int = 512
    """Requests waiting for admission before QUEUE_FULL."""
    prefix_cache: bool = True
    kv_host_bytes: int = -1
    """Host memory for prefix blocks that the pool evicts; 0: none; -1: none on cpu, where the pool is host memory itself, and for a group of ranks, and on cuda four times the pool, but at most a twentieth of the memory that is available."""
    kv_disk_folder: str = ""
    """Where prefix blocks go that leave host memory; each worker takes a folder of its name in it. Empty: no disk tier."""
    kv_disk_bytes: int = 8 << 30
    """What one worker may keep in kv_disk_folder."""
    local_prefill_tokens: int = 64
    """A decode worker computes a prompt with at most this many uncached tokens itself."""
    transports: tuple[str, ...] = ("loopback", "shm", "tcp", "grpc")
    """KV transports this worker may use, best first."""
    transfer_timeout_s: float = 30.0
    """A handoff without any progress for this long has failed."""
    max_pause_s: float = 2.0
    """A sequence that moves to another worker stands still for at most this long; then it goes on where it is."""
    drain_timeout_s: float = 30.0
    """How long a worker that is told to leave waits for its requests to move away or end."""
    transfer_window_bytes: int = 32 << 20
    """KV bytes of one handoff that may be announced and not yet acknowledged."""
    max_pending_frames: int = 1024
    """Outputs of this many steps may wait for a slow router before it is disconnected."""
    orphan_grace_s: float = 30.0
    """A request whose router is lost goes on for so long, and what has ended is kept, for whichever router takes it up; 0: it is cancelled at once."""
    max_orphans: int = 256
    """Requests without a router at once; beyond that the oldest are given up."""
    max_kept_tokens: int = 8192
    """Output tokens of each request that are kept for a router that takes it up; an alternative among logprobs counts as one more."""
    host: str = "127.0.0.1"
    port: int = 0
    """gRPC port; 0: any free one."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        checks = (
            (bool(self.model), "model", "needs the path of a checkpoint folder"),
            (self.dtype in ("float32", "bfloat16"), "dtype", "must be float32 or bfloat16"),
            (re.fullmatch(r"cpu|cuda(:\d+)?", self.device) is not None, "device", "must be cpu, cuda or cuda:N"),
            (
                self.deterministic or self.device != "cpu",
                "deterministic",
                "must be true on cpu, which has no other mode",
            ),
            (self.num_threads >= 1, "num_threads", "must be at least 1"),
            (
                not self.cpus or (self.parallel.size == 1 and self.device == "cpu"),
                "cpus",
                "must be empty for a group of ranks, and on cuda",
            ),
            (self.packed_weights_bytes >= 0, "packed_weights_bytes", "must be 0 (none are kept) or positive"),
            (
                self.instruction_set in ("auto", *INSTRUCTION_SETS),
                "instruction_set",
                f"must be auto or one of {', '.join(INSTRUCTION_SETS)}",
            ),
            (self.max_model_len >= 0, "max_model_len", "must be 0 (the model's own) or positive"),
            (self.kv_memory_bytes >= 0, "kv_memory_bytes", "must be 0 (automatic) or positive"),
            (0 < self.kv_memory_fraction <= 0.95, "kv_memory_fraction", "must be above 0 and at most 0.95"),
            (self.max_num_seqs >= 1, "max_num_seqs", "must be at least 1"),
            (
                self.max_batch_tokens >= self.max_num_seqs,
                "max_batch_tokens",
                "must be at least max_num_seqs, so that every running sequence gets its token each step",
            ),
            (self.max_queue >= 1, "max_queue", "must be at least 1"),
            (self.kv_host_bytes >= -1, "kv_host_bytes", "must be -1 (automatic), 0 (none) or positive"),
            (self.kv_disk_bytes >= 1 << 20, "kv_disk_bytes", "must be at least 1 MiB; empty kv_disk_folder for none"),
            (
                self.prefix_cache or not (self.kv_disk_folder or self.kv_host_bytes > 0),
                "prefix_cache",
                "must be true for kv_host_bytes and kv_disk_folder, which keep prefix blocks",
            ),
            (self.local_prefill_tokens >= 0, "local_prefill_tokens", "must not be negative"),
            (
                bool(self.transports) and set(self.transports) <= set(BEST_FIRST),
                "transports",
                f"must name at least one of {', '.join(BEST_FIRST)}",
            ),
            (
                self.parallel.dispatch != "device" or self.device != "cpu",
                "parallel",
                "must leave dispatch at auto or all_to_all on cpu",
            ),
            (self.max_pause_s > 0, "max_pause_s", "must be positive"),
            (self.orphan_grace_s >= 0, "orphan_grace_s", "must be 0 (none) or positive"),
            (self.max_orphans >= 0, "max_orphans", "must not be negative"),
            (self.max_kept_tokens >= 0, "max_kept_tokens", "must not be negative"),
            (self.drain_timeout_s >= 0, "drain_timeout_s", "must not be negative"),
            (self.transfer_timeout_s > 0, "transfer_timeout_s", "must be positive"),
            (self.transfer_window_bytes >= 1 << 20, "transfer_window_bytes", "must be at least 1 MiB"),
            (0 <= self.port < 65536, "port", "must be a TCP port, or 0 for any free one"),
        )
        for ok, name, what in checks:
            if not ok:
                raise InvalidConfig(f"worker.{name} {what}; it is {getattr(self, name)!r}")
