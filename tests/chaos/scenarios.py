"""The arenas of a full run: which transports, which faults, how many requests each. Runs nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from builders import run_alone

from chaos.arena import Shape
from chaos.faults import PROCESS_KINDS, WORKER_KINDS, Fault, Kind, draw_plan
from chaos.processes import ROOT
from chaos.routers import KINDS, RouterRun, draw_router_plan
from chaos.routers import draw_requests as routers_requests
from chaos.run import ChaosRun, Result, draw_requests
from workers.config import WorkerConfig
from workers.request import Request

Golden = Callable[[Request], tuple[list[int], str]]
"""(tokens, text) of a request that has an engine for itself, without network and faults."""

FAKE: dict[str, Any] = {
    "model": "fake",
    "local_prefill_tokens": 0,
    "max_batch_tokens": 96,
    "max_num_seqs": 16,
    "transfer_timeout_s": 2.5,
}
MODEL = ROOT / "models" / "ernie-4.5-tiny"
REAL: dict[str, Any] = {**FAKE, "model": str(MODEL), "kv_memory_bytes": 32 << 20}
MEMORY_BLOCKS, MEMORY_ROOM_BYTES = 1 << 17, 160 << 20
"""A pool of 256 MiB, and workers that can map 160 MiB more."""


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    shape: Shape
    requests: list[Request]
    plan: list[Fault | None]
    golden: Golden
    concurrency: int

    async def run(self) -> Result:
        chaos = ChaosRun(self.shape, self.requests, self.plan, self.golden, self.concurrency)
        return await chaos.run(self.name)


def golden_fake(request: Request) -> tuple[list[int], str]:
    outputs = run_alone(request, 64, max_batch_tokens=512, max_model_len=4096)
    return [token for output in outputs for token in output.token_ids], "".join(output.text for output in outputs)


def golden_real() -> Golden:
    """One engine around the shipped model, used for one request after the other."""
    from workers.worker import load_checkpoint, make_engine

    config = WorkerConfig(model=str(MODEL), kv_memory_bytes=32 << 20, prefix_cache=False)
    engine = make_engine(config, load_checkpoint(config))

    turn = threading.Lock()

    def golden(request: Request) -> tuple[list[int], str]:
        tokens: list[int] = []
        text = ""
        with turn:
            engine.add(0, request)
            while engine.has_work:
                for _, output in engine.step().outputs:
                    tokens += output.token_ids
                    text += output.text
        return tokens, text

    return golden


def chain(transport: str) -> tuple[str, ...]:
    """The transport and what it degrades to."""
    return (transport,) if transport == "grpc" else (transport, "grpc")


def prompts(
    seed: int,
    transport: str,
    count: int,
    kinds: Sequence[Kind] = WORKER_KINDS,
    concurrency: int = 24,
    num_each: int = 3,
) -> Scenario:
    """Faults at every step of prompts' handoffs and of the streams to the router; `num_each` workers of each role."""
    # In one process with its peer no worker can be stopped or killed alone; the pair goes together.
    config = {**FAKE, "transports": chain(transport)}
    shape = Shape(num_each, num_each, config, together=transport == "loopback")
    requests = draw_requests(seed, transport, count)
    return Scenario(transport, shape, requests, draw_plan(seed, transport, count, kinds), golden_fake, concurrency)


def moves(
    seed: int, transport: str, count: int, kinds: Sequence[Kind] = WORKER_KINDS, concurrency: int = 8
) -> Scenario:
    """Faults at every step of running requests' migrations."""
    name = f"move-{transport}"
    shape = Shape(2, 3, {**FAKE, "transports": chain(transport)}, num_blocks=192)
    requests = draw_requests(seed, name, count, lengths=(500, 800))
    return Scenario(name, shape, requests, draw_plan(seed, transport, count, kinds, True), golden_fake, concurrency)


def memory(seed: int, count: int) -> Scenario:
    """Decode workers that cannot map another worker's pool: shared memory is full."""
    name = "memory"
    shape = Shape(2, 2, {**FAKE, "transports": ("shm", "tcp", "grpc")}, MEMORY_BLOCKS, False, MEMORY_ROOM_BYTES)
    return Scenario(name, shape, draw_requests(seed, name, count), [None] * count, golden_fake, 8)


def real(seed: int, count: int, kinds: Sequence[Kind] = WORKER_KINDS) -> Scenario:
    """The shipped model instead of the fake one; all workers survive (they take long to start), nothing else does."""
    name = "model"
    shape = Shape(2, 2, {**REAL, "transports": ("shm", "tcp", "grpc")})
    gentle = [kind for kind in kinds if kind not in PROCESS_KINDS] + [Kind.STOP_DECODE, Kind.SWITCH_PREFILL]
    requests = draw_requests(seed, name, count, lengths=(8, 24, 60))
    return Scenario(name, shape, requests, draw_plan(seed, "shm", count, gentle), golden_real(), 8)


def routers(seed: int, count: int, kinds: Sequence[Kind] = KINDS) -> RouterRun:
    """Routers are killed under clients that resume, beside workers."""
    plan = draw_router_plan(seed, count, tuple(kinds))
    return RouterRun({**FAKE, "transports": ("grpc",)}, routers_requests(seed, count), plan, golden_fake, 12)


SHARES = {
    "shm": 20,
    "tcp": 20,
    "grpc": 20,
    "loopback": 12,
    "gloo": 6,
    "move-shm": 8,
    "move-tcp": 8,
    "memory": 2,
    "model": 4,
    "routers": 6,
}
"""Percent of the requests."""


def full(seed: int, num_requests: int, names: Sequence[str], kinds: Sequence[Kind]) -> list[Scenario | RouterRun]:
    """The named arenas; together they have `num_requests` requests, in the proportions of SHARES."""
    total = sum(SHARES[name] for name in names)
    counts = {name: num_requests * SHARES[name] // total for name in names}
    counts[names[0]] += num_requests - sum(counts.values())
    made: list[Scenario | RouterRun] = []
    of_workers = [kind for kind in kinds if kind in WORKER_KINDS]
    for name, count in counts.items():
        if name == "memory":
            made.append(memory(seed, count))
        elif name == "model":
            made.append(real(seed, count, of_workers))
        elif name == "routers":
            made.append(routers(seed, count, kinds))
        elif name.startswith("move-"):
            made.append(moves(seed, name.removeprefix("move-"), count, of_workers))
        else:
            made.append(prompts(seed, name, count, of_workers))
    return made
