"""The settings of one worker: model, KV pool, batch limits and timeouts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from workers.errors import InvalidConfig
from workers.limits import RequestLimits

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Seconds = Annotated[float, Gt(0)]
"""A time that must pass."""
Delay = Annotated[float, Ge(0)]
"""A time that may be none at all."""
Port = Annotated[int, Ge(0), Lt(65536)]
"""A TCP port; 0: any free one."""
Text = Annotated[str, MinLen(1)]
Share = Annotated[float, Gt(0), Le(1)]


InstructionSet = Literal["amx", "avx512bf16", "avx512", "avx2", "neonbf16", "neon"]
"""Those that the C++ kernels are written for, better ones first."""

MAX_DIRECT_RANKS = 16
"""torch's device-side exchange (all_to_all_vdev_2d_offset) takes no larger groups."""

BEST_FIRST = ("loopback", "cuda_ipc", "shm", "nccl", "nixl", "tcp", "gloo", "grpc")
"""Every transport, the fastest first: memory of one process, device, host; then networks as measured (docs/benchmarks/kv.md)."""
SAME_HOST = frozenset({"loopback", "cuda_ipc", "shm"})


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How one worker is spread over a group of ranks; by default it is one rank.

    A group has max(expert_parallel, tensor_parallel) ranks. Attention is data-parallel over expert_parallel /
    tensor_parallel parts of the group, each with its own sequences.
    """

    expert_parallel: Annotated[int, Ge(1), Le(1024)] = 1
    """Ranks that share a mixture's experts."""
    tensor_parallel: Annotated[int, Ge(1), Le(64)] = 1
    """Ranks that share the heads and dense feed-forward layers of the same sequences; 1: attention is data-parallel."""
    redundant_experts: Natural = 0
    """Further copies of busy experts, over the whole group and per layer."""
    ranks_per_node: Natural = 0
    """Ranks that share a host, which experts' copies are packed into first; 0: the whole group is on one."""
    exact_combine: bool = True
    """Expert outputs travel back one by one and are added as on a single rank, bit for bit. False: each rank adds its own first, which sends less."""
    dispatch: Literal["auto", "all_to_all", "device"] = "auto"
    """How rows reach experts on GPUs: device keeps the number of rows that travel on the GPU (NVSHMEM; a rank that is lost then ends the processes of all), all_to_all asks the host and runs everywhere. auto is all_to_all for now: torch's device operations are reported to race."""
    min_overlap_tokens: Natural = 0
    """Steps with at least this many tokens run as two halves, one communicating while the other computes; 0: never."""
    rebalance_steps: Natural = 0
    """Steps between looks at the experts' load; 0: experts move on command only."""
    rebalance_above: Annotated[float, Ge(1)] = 1.2
    """Load of the busiest rank over the mean, above which such a look moves experts."""
    heartbeat_timeout_s: Seconds = 5.0
    """A rank that has been silent for this long is lost; ranks speak four times as often."""
    step_timeout_s: Seconds = 120.0
    """A rank that speaks but does not end its step for this long is lost."""
    form_timeout_s: Seconds = 30.0
    """The ranks of a group must have found each other within this time; otherwise they try again."""

    def __post_init__(self) -> None:
        checks = (
            (
                self.size % (self.ranks_per_node or self.size) == 0,
                "ranks_per_node",
                f"must be 0 or divide the group's {self.size} ranks",
            ),
            (
                self.dispatch != "device" or (self.size <= MAX_DIRECT_RANKS and not self.min_overlap_tokens),
                "dispatch",
                f"must be auto or all_to_all for more than {MAX_DIRECT_RANKS} ranks, and with min_overlap_tokens",
            ),
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

    Types and bounds are checked where settings are read (cluster.settings.build). Construction raises InvalidConfig for
    settings that do not go together.
    """

    model: Text
    """Path of a "-PT" checkpoint folder."""
    served_model_name: str = ""
    """Name in the API; the folder's name when empty."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and KV."""
    device: str = "cpu"
    """cpu, cuda, or cuda:N for the N-th GPU that the process sees."""
    deterministic: bool = True
    """A sequence gets the same bits whatever runs beside it. False, on cuda only, allows kernels that depend on the batch."""
    num_threads: Count = 1
    cpus: str = ""
    """Processors of the computing threads, such as "0-3,8" or "numa:0"; their NUMA nodes hold weights and KV. Empty: any."""
    native: bool = True
    """Compute with the C++ kernels, built ahead or else compiled at first use; where neither can be had, or when false, with PyTorch's."""
    instruction_set: Literal[InstructionSet, "auto"] = "auto"
    """Which C++ kernels to run: auto (the best that the processor has), avx2, avx512, avx512bf16, amx, neon or neonbf16."""
    cache_folder: str = ""
    """Where kernels compiled at first use and packed weights are kept; ~/.cache/baton when empty."""
    packed_weights_bytes: Natural = 0
    """What packed weights may take in cache_folder, those not used for longest going first, so that a restart copies them instead of packing; 0: none are kept. For the C++ kernels, and no group of ranks."""
    max_model_len: Natural = 0
    """Longest prompt + output; 0: the model's max_position_embeddings."""
    kv_memory_bytes: Natural = 0
    """Size of the KV pool; 0: kv_memory_fraction of the memory (on cuda, of the GPU, beside the weights) that is free when the worker starts, but at most 64 full-length sequences."""
    kv_memory_fraction: Annotated[float, Gt(0), Le(0.95)] = 0.2
    max_num_seqs: Count = 64
    """Sequences that run at once."""
    max_batch_tokens: Count = 512
    """Token budget of one step, prefill chunks and decode tokens together."""
    max_prefill_pause_s: Seconds = 0.04
    """How long the prompts of a step may keep sequences waiting that decode in it, or as long as decoding takes, if that is longer: long
    prompts are computed in as many steps as that needs."""
    max_decode_pause_s: Seconds = 0.08
    """How long a step may take for the contexts of sequences that decode in it, or twice as long as one with little in it, if that is
    longer: where it would be longer and some are short, the long ones decode in turns."""
    overlap_steps: bool = True
    """On cuda, schedule and launch a step while the one before it runs. On the cpu, host and device are one."""
    max_queue: Count = 512
    """Requests waiting for admission before QUEUE_FULL."""
    min_free_bytes: Natural = 128 << 20
    """While this host, or this container, has less memory left, prefix blocks that the pool evicts are dropped, and not kept in host memory
    or on disk; 0: never."""
    prefix_cache: bool = True
    kv_host_bytes: Annotated[int, Ge(-1)] = -1
    """Host memory for prefix blocks that the pool evicts; 0: none; -1: none on cpu, where the pool is host memory itself, and for a group of ranks, and on cuda four times the pool, but at most a twentieth of the memory that is available."""
    kv_disk_folder: str = ""
    """Where prefix blocks go that leave host memory; each worker takes a folder of its name in it. Empty: no disk tier."""
    kv_disk_bytes: Annotated[int, Ge(1 << 20)] = 8 << 30
    """What one worker may keep in kv_disk_folder."""
    local_prefill_tokens: Natural = 64
    """A decode worker computes a prompt with at most this many uncached tokens itself."""
    transports: tuple[str, ...] = ("loopback", "shm", "tcp", "grpc")
    """KV transports this worker may use, best first."""
    kv_encryption: Literal["auto", "off"] = "auto"
    """auto: KV over tcp is encrypted wherever workers have certificates (tls.mode), also on one host; off: it is not, which is for private networks. grpc is inside TLS as the control stream is; gloo, nccl and nixl never encrypt, memory needs not."""
    transfer_timeout_s: Seconds = 30.0
    """A handoff without any progress for this long has failed."""
    max_pause_s: Seconds = 2.0
    """A sequence that moves to another worker stands still for at most this long; then it goes on where it is."""
    drain_timeout_s: Delay = 30.0
    """How long a worker that is told to leave waits for its requests to move away or end."""
    otlp_endpoint: str = ""
    """URL of an OpenTelemetry collector (OTLP over HTTP, such as http://collector:4318) that spans are sent to; empty: nowhere."""
    transfer_window_bytes: Annotated[int, Ge(1 << 20)] = 32 << 20
    """KV bytes of one handoff that may be announced and not yet acknowledged."""
    max_pending_frames: Count = 1024
    """Outputs of this many steps may wait for a slow router before it is disconnected."""
    max_routers: Count = 128
    """Streams of routers at once; a router that is back after a fault has two for a moment."""
    orphan_grace_s: Delay = 30.0
    """A request whose router is lost goes on for so long, and what has ended is kept, for whichever router takes it up; 0: it is cancelled at once."""
    max_orphans: Natural = 256
    """Requests without a router at once; beyond that the oldest are given up."""
    max_kept_tokens: Natural = 8192
    """Output tokens of each request that are kept for a router that takes it up; an alternative among logprobs counts as one more."""
    answers_kept_s: Delay = 120.0
    """An answer that has ended is kept for so long, for clients that ask for it again by its id or Idempotency-Key, of whichever router; 0: none is."""
    max_kept_answer_bytes: Natural = 64 << 20
    """Of all these together, about; the oldest go first."""
    host: str = "127.0.0.1"
    port: Port = 0
    """gRPC port; 0: any free one."""
    limits: RequestLimits = field(default_factory=RequestLimits)
    """How much one request may hold in its lists and texts."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        checks = (
            (re.fullmatch(r"cpu|cuda(:\d+)?", self.device) is not None, "device", "must be cpu, cuda or cuda:N"),
            (
                self.deterministic or self.device != "cpu",
                "deterministic",
                "must be true on cpu, which has no other mode",
            ),
            (
                not self.cpus or (self.parallel.size == 1 and self.device == "cpu"),
                "cpus",
                "must be empty for a group of ranks, and on cuda",
            ),
            (
                self.max_batch_tokens >= self.max_num_seqs,
                "max_batch_tokens",
                "must be at least max_num_seqs, so that every running sequence gets its token each step",
            ),
            (
                self.prefix_cache or not (self.kv_disk_folder or self.kv_host_bytes > 0),
                "prefix_cache",
                "must be true for kv_host_bytes and kv_disk_folder, which keep prefix blocks",
            ),
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
        )
        for ok, name, what in checks:
            if not ok:
                raise InvalidConfig(f"worker.{name} {what}; it is {getattr(self, name)!r}")
