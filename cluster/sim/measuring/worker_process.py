"""Workers in a process of their own: real ones, or with real schedulers, streams and transports around a runner that computes nothing.

`python -m cluster.sim.measuring.worker_process JSON` serves until standard input ends; its first line says where.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cluster.settings import build
from workers.config import WorkerConfig
from workers.engine.fake_runner import FakeRunner
from workers.errors import BatonError
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.request import Request
from workers.runner import BLOCK_SIZE
from workers.status import ModelInfo, Role, WorkerAddress
from workers.text.output import Detokenizer
from workers.text.tokenizer import IncrementalDetokenizer, Tokenizer
from workers.worker import Worker


class FakeModel:
    """Implements workers.worker.LoadedModel: a fake runner over a pool of a real model's shape."""

    eos_token_ids: tuple[int, ...] = ()
    vocabulary = None

    def __init__(self, tokenizer: Tokenizer, layout: KvLayout, max_model_len: int, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.runner = FakeRunner(KvMemory(layout), vocab_size)
        self.info = ModelInfo("fake", "fake", vocab_size, max_model_len, BLOCK_SIZE)

    def make_detokenizer(self, request: Request) -> Detokenizer:
        return IncrementalDetokenizer(self._tokenizer, request.prompt_token_ids[-16:], True)


async def serve(spec: dict[str, Any]) -> None:
    """`spec`: `settings` of one real worker and its `role`; or model (a folder with a tokenizer), layout, max_model_len, vocab_size and workers
    ([name, role] each), which compute nothing."""
    workers = [_real(spec["settings"], Role(spec["role"]))] if "settings" in spec else _fakes(spec)
    addresses = [await worker.start() for worker in workers]
    print(json.dumps([[a.worker_id, a.generation, a.target] for a in addresses]), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for worker in workers:
        await worker.stop()


def _real(settings: dict[str, Any], role: Role) -> Worker:
    return Worker(build(WorkerConfig, settings, "worker"), f"{role}-0", 1, role)


def _fakes(spec: dict[str, Any]) -> list[Worker]:
    tokenizer = Tokenizer.load(spec["model"])
    layout = KvLayout(**spec["layout"])
    config = WorkerConfig(
        model=spec["model"],
        prefix_cache=False,
        local_prefill_tokens=0,
        max_model_len=spec["max_model_len"],
        max_batch_tokens=max(8192, spec["max_model_len"]),
    )
    workers = []
    for name, role in spec["workers"]:
        model = FakeModel(tokenizer, replace(layout), spec["max_model_len"], spec["vocab_size"])
        workers.append(Worker(config, name, 1, Role(role), load=lambda _, model=model: model))  # type: ignore[misc]
    return workers


@contextmanager
def worker_process(spec: dict[str, Any]) -> Iterator[list[WorkerAddress]]:
    """Addresses of the workers of one process, as `serve` has it. Raises BatonError when it ends before it serves."""
    command = [sys.executable, "-m", "cluster.sim.measuring.worker_process", json.dumps(spec)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None and process.stdin is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise BatonError("a worker process ended before it served: is there memory for another one?")
        yield [WorkerAddress(*fields) for fields in json.loads(line)]
    finally:
        process.stdin.close()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
