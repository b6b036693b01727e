"""Names of settings that vLLM and FastDeploy have, and what they are here: read by `baton serve` and by `LLM(...)`, each from this table.

`python -m cluster.aliases` writes docs/aliases.md from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from workers.errors import InvalidConfig
from workers.kv_memory.memory import KvLayout
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.runner import BLOCK_SIZE

_GIB = 1 << 30


class Kind(Enum):
    """SETS: stands for one of our settings. TOLD: changes nothing here, which is said; answers are the same. REFUSED: would
    change answers or what is served, so only the values in `same`, which ask for nothing, are taken."""

    SETS = "sets"
    TOLD = "told"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Alias:
    """`name` is spelled as on the command line; LLM has it with underscores."""

    name: str
    kind: Kind
    what: str
    """The setting, or a sentence."""
    is_switch: bool = False
    same: tuple[Any, ...] = ()
    read: Callable[[Any], Any] = lambda value: value
    short: str = ""
    note: str = ""
    """About a setting that is not quite the same."""

    @property
    def keyword(self) -> str:
        return self.name.replace("-", "_")


def read_dtype(value: Any) -> str | None:
    """None: as configured. Raises InvalidConfig for types that are not computed in."""
    known = {"auto": None, "float": "float32", "float32": "float32", "bfloat16": "bfloat16"}
    name = str(value).removeprefix("torch.")
    if name not in known:
        raise InvalidConfig(f"dtype {name!r:.80} is not computed in: choose float32 or bfloat16, as checkpoints are")
    return known[name]


def _length(value: Any) -> Any:
    """Tokens; 8k and 8K as vLLM reads them. auto and -1: what the model has."""
    if value in ("auto", "-1", -1):
        return 0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM])", value) if isinstance(value, str) else None
    if found is None:
        return value
    unit = {"k": 1000, "m": 1000**2, "K": 1024, "M": 1024**2}[found[2]]
    return int(float(found[1]) * unit)


def _one_name(value: Any) -> Any:
    names = [value] if isinstance(value, str) else list(value)
    if len(names) != 1:
        raise InvalidConfig("served-model-name takes one name: a cluster serves a model under one")
    return names[0]


def _listed(value: Any) -> Any:
    """vLLM's lists are JSON."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InvalidConfig(f'{value!r:.80} is no list in JSON, such as ["https://a.example"]') from None


def _bytes(value: Any) -> int:
    try:
        return round(float(value) * _GIB)
    except (TypeError, ValueError, OverflowError):
        raise InvalidConfig(f"{value!r:.80} is no number of GiB") from None


def _set(name: str, setting: str, **more: Any) -> Alias:
    return Alias(name, Kind.SETS, setting, **more)


def _told(what: str, *names: str, is_switch: bool = False) -> tuple[Alias, ...]:
    return tuple(Alias(name, Kind.TOLD, what, is_switch) for name in names)


def _refused(what: str, *names: str, same: tuple[Any, ...] = (), **more: Any) -> tuple[Alias, ...]:
    return tuple(Alias(name, Kind.REFUSED, what, same=same, **more) for name in names)


BLOCKS = "num-gpu-blocks-override"
_KV_DTYPE = Alias(
    "kv-cache-dtype", Kind.REFUSED, "KV is kept in worker.dtype, and that name alone is taken", same=("auto",)
)
_EXPERTS = "enable-expert-parallel"
_PORTS = "Baton places its processes itself and picks free ports: --prefill, --decode and --mixed say how many workers there are"
_ALWAYS = "it is always so"

ALIASES: tuple[Alias, ...] = (
    # the model
    _set("served-model-name", "worker.served_model_name", read=_one_name, note="one name"),
    _set("max-model-len", "worker.max_model_len", read=_length),
    _set("device", "worker.device", read=lambda value: None if value == "auto" else value),
    _set("revision", "hub.revision"),
    _set("download-dir", "hub.cache_folder"),
    *_refused("put it into the environment's HF_TOKEN: every user of a host can read a command line", "hf-token"),
    *_refused("the tokenizer is the checkpoint's own", "tokenizer", "tokenizer-revision"),
    *_refused("a checkpoint's own chat template is used: put yours into its folder as chat_template.jinja", "chat-template"),
    *_refused("weights are read as safetensors", "load-format", "load-choices", same=("auto", "safetensors", "default", "default_v1")),
    *_refused("weights are computed as float32 or bfloat16 (worker.dtype)", "quantization", same=("none", "None"), short="-q"),
    *_refused("only text models are served", "limit-mm-per-prompt", "mm-processor-kwargs"),
    *_refused("adapters are not served: merge them into the weights", "enable-lora", is_switch=True, same=(False,)),
    *_refused("adapters are not served: merge them into the weights", "lora-modules"),
    *_refused("generation_config.json of the checkpoint says it, and router.api.sampling_defaults", "generation-config", same=("auto",)),
    _set("override-generation-config", "router.api.sampling_defaults"),
    *_told("no code of a checkpoint is ever run", "trust-remote-code", is_switch=True),
    *_told("a request says its own seed; with it the same request gives the same text, always", "seed"),
    # memory and batches
    _set("max-num-seqs", "worker.max_num_seqs"),
    _set("max-num-batched-tokens", "worker.max_batch_tokens"),
    _set(
        "gpu-memory-utilization",
        "worker.kv_memory_fraction",
        note="of the memory that is free beside the weights, at most 0.95; workers that share a host or a GPU should stay below 1 together",
    ),
    Alias(BLOCKS, Kind.SETS, "worker.kv_memory_bytes", note=f"that many blocks of {BLOCK_SIZE} tokens"),
    *_refused(f"a block has {BLOCK_SIZE} tokens", "block-size", same=(BLOCK_SIZE, str(BLOCK_SIZE))),
    _KV_DTYPE,
    _set("swap-space", "worker.kv_host_bytes", read=_bytes, note="GiB of host memory for prefix blocks; running sequences are not swapped"),
    _set("kv-offloading-size", "worker.kv_host_bytes", read=_bytes, note="GiB"),
    _set("enable-prefix-caching", "worker.prefix_cache", is_switch=True),
    *_told("prompts are always computed in chunks, between the tokens of others", "enable-chunked-prefill", is_switch=True),
    *_told("the scheduler splits prompts by worker.max_batch_tokens alone", "max-num-partial-prefills", "max-long-partial-prefills", "long-prefill-token-threshold"),
    *_told("KV of prompts and outputs comes from one pool, block by block", "kv-cache-ratio", "static-decode-blocks", "prealloc-dec-block-slot-num-threshold", "kvcache-storage-backend"),
    *_told("KV of outputs stays in the prefix cache where decoding writes the bits of a prompt's computation (C++ kernels)", "enable-output-caching", is_switch=True),
    *_told("weights are not moved to host memory", "cpu-offload-gb"),
    *_told("prefix blocks are named by xxh3 and compared token by token", "prefix-caching-hash-algo"),
    *_told("steps overlap by worker.overlap_steps", "async-scheduling", is_switch=True),
    *_told("requests go by their targets and priority", "scheduling-policy"),
    # several devices
    _set("tensor-parallel-size", "worker.parallel.tensor_parallel", short="-tp"),
    Alias(_EXPERTS, Kind.SETS, "worker.parallel.expert_parallel", is_switch=True, note="as many ranks as tensor-parallel-size"),
    *_refused("layers are not spread over ranks: use tensor-parallel-size", "pipeline-parallel-size", same=(1, "1")),
    *_refused("further copies of the model are workers: say --prefill, --decode, --mixed", "data-parallel-size", same=(1, "1")),
    *_told("experts are copied and moved by worker.parallel.redundant_experts and rebalance_steps", "enable-eplb", is_switch=True),
    *_told("experts are copied and moved by worker.parallel.redundant_experts and rebalance_steps", "eplb-config"),
    *_told("Ray places workers, and nothing else", "distributed-executor-backend"),
    *_told("no kernel of NCCL is replaced", "disable-custom-all-reduce", is_switch=True),
    *_told(_PORTS, "splitwise-role", "router", "scheduler-name", "engine-worker-queue-port", "cache-queue-port", "pd-comm-port", "rdma-comm-ports", "controller-port", "kv-transfer-config"),
    # how it computes
    *_told("tokens are not drafted; answers are the same without", "speculative-config", "speculative-model", "num-speculative-tokens"),
    *_told("graphs are not captured by a setting", "enforce-eager", "use-cudagraph", is_switch=True),
    *_told("graphs are not captured by a setting", "graph-optimization-config", "compilation-config", "cuda-graph-sizes", "max-seq-len-to-capture"),
    *_refused("attention is exact, over all tokens", "plas-attention-config", "moba-attention-config"),
    *_refused("an answer is not cut short by what it says", "early-stop-config"),
    *_refused("an answer is not cut short by what it says", "enable-early-stop", is_switch=True, same=(False,)),
    *_refused("no code of others runs where tokens are drawn", "logits-processors"),
    # answers
    _set("reasoning-parser", "router.api.reasoning_parser"),
    _set("tool-call-parser", "router.api.tool_parser"),
    *_refused("install a package that offers the format as an entry point (docs/api.md), and name it", "tool-parser-plugin", "reasoning-parser-plugin"),
    *_told(_ALWAYS, "enable-auto-tool-choice", "enable-reasoning", "enable-logprob", is_switch=True),
    *_told("llguidance reads all grammars", "guided-decoding-backend", "structured-outputs-config"),
    *_refused("logprobs are the model's, before penalties and masks", "logprobs-mode", same=("raw_logprobs",)),
    _set("max-logprobs", "worker.limits.logprobs", note="20 to 2048, alternatives of each token"),
    # the server
    _set("root-path", "router.api.root_path"),
    _set("uds", "router.uds", note="beside the port"),
    _set("ssl-certfile", "router.cert_file"),
    _set("ssl-keyfile", "router.key_file"),
    *_refused("clients show keys, not certificates", "ssl-ca-certs"),
    _set("allowed-origins", "router.api.cors.origins", read=_listed),
    _set("allowed-methods", "router.api.cors.methods", read=_listed),
    _set("allowed-headers", "router.api.cors.headers", read=_listed),
    *_told("keys travel in a header that a page sets itself", "allow-credentials", is_switch=True),
    _set("access-log", "router.api.access_log"),
    _set("access-log-file", "router.api.access_log_file"),
    _set("timeout-keep-alive", "router.keepalive_s"),
    _set("shutdown-timeout", "router.shutdown_timeout_s"),
    _set("timeout-graceful-shutdown", "router.shutdown_timeout_s"),
    _set("api-server-count", "pools.routers"),
    _set("workers", "pools.routers", note="processes that answer HTTP; each listens on a port of its own"),
    _set("max-concurrency", "router.max_running"),
    _set("otlp-traces-endpoint", "router.otlp_endpoint"),
    *_told("metrics are at /metrics of the same port", "metrics-port"),
    *_told("what is logged is said by router.api.access_log", "disable-log-requests", "enable-log-requests", "disable-log-stats", "disable-uvicorn-access-log", is_switch=True),
    *_told("what is logged is said by router.api.access_log", "uvicorn-log-level", "max-log-len"),
)  # fmt: skip
BY_KEYWORD = {alias.keyword: alias for alias in ALIASES}


def settings_of(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Dotted settings that aliases (by keyword) stand for, and what is to be said of those that change nothing here. None stands for
    one that was not given. Raises InvalidConfig for what cannot be had."""
    laid: dict[str, Any] = {}
    notes: list[str] = []
    for keyword, value in given.items():
        alias = BY_KEYWORD[keyword]
        if value is None:
            continue
        if alias.kind is Kind.TOLD:
            notes.append(f"{alias.name} changes nothing here: {alias.what}")
        elif alias.kind is Kind.REFUSED:
            if alias is not _KV_DTYPE and value not in alias.same:
                raise _refusal(alias, value)
        elif alias.name == _EXPERTS:
            if value:
                laid[alias.what] = given.get("tensor_parallel_size") or 1
        elif alias.name != BLOCKS and (read := alias.read(value)) is not None:
            laid[alias.what] = read
    return laid, notes


def _refusal(alias: Alias, value: Any) -> InvalidConfig:
    return InvalidConfig(f"{alias.name} {value!r:.80} cannot be had: {alias.what}")


def check_kv_dtype(given: Mapping[str, Any], dtype: str) -> None:
    """`dtype` is what weights and KV will have, wherever that was said. Raises InvalidConfig for another one of KV."""
    value = given.get(_KV_DTYPE.keyword)
    if value is not None and str(value).removeprefix("torch.") not in (*_KV_DTYPE.same, dtype):
        raise _refusal(_KV_DTYPE, value)


def kv_bytes(model: str, dtype: str, tensor_parallel: int, num_blocks: Any) -> int:
    """worker.kv_memory_bytes of a pool of so many blocks. Raises InvalidConfig."""
    if not str(num_blocks).isdecimal() or not int(num_blocks):
        raise InvalidConfig(f"{BLOCKS} must be a number of blocks; it is {num_blocks!r:.80}")
    read = ErnieConfig.load(Path(model))
    heads = max(1, read.num_kv_heads // tensor_parallel)
    size = 4 if dtype == "float32" else 2
    return KvLayout(int(num_blocks), read.num_layers, heads, BLOCK_SIZE, read.head_dim, dtype, size).pool_bytes


def page(aliases: Iterable[Alias] = ALIASES) -> str:
    """docs/aliases.md."""
    rows = []
    for alias in aliases:
        name = f"`--{alias.name}`" + (f", `{alias.short}`" if alias.short else "")
        match alias.kind:
            case Kind.SETS:
                effect = f"`{alias.what}`" + (f": {alias.note}" if alias.note else "")
            case Kind.TOLD:
                effect = f"changes nothing: {alias.what}"
            case Kind.REFUSED:
                same = ", ".join(dict.fromkeys(f"`{value}`" for value in alias.same))
                effect = f"refused{f' but for {same}' if same else ''}: {alias.what}"
        rows.append(f"| {name} | {effect} |")
    head = (
        "# Names that vLLM and FastDeploy have\n\n"
        "`baton serve` takes these flags beside its own, and `LLM(...)` takes them as keywords with underscores. Those that stand for a setting of\n"
        "the router or the cluster change nothing in `LLM`, which says so. A key is never taken on the command line, where every user of a host can\n"
        "read it: `--api-key` says where it belongs. This page is written by `python -m cluster.aliases`.\n\n"
        "| name | here |\n|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(page(), end="")
