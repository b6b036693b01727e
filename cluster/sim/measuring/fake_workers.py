"""Workers in a process of their own that compute nothing: real schedulers, streams and transports around a fake runner.

`python -m cluster.sim.measuring.fake_workers JSON` serves until standard input ends; its first line says where.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from typing import Any

from workers.config import WorkerConfig
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.request import Request
from workers.runner import BLOCK_SIZE, FakeRunner
from workers.status import ModelInfo, Role
from workers.text.output import Detokenizer
from workers.text.tokenizer import IncrementalDetokenizer, Tokenizer
from workers.worker import Worker


class FakeModel:
    """Implements workers.worker.LoadedModel: a fake runner over a pool of a real model's shape."""

    eos_token_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: Tokenizer, layout: KvLayout, max_model_len: int, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.runner = FakeRunner(KvMemory(layout), vocab_size)
        self.info = ModelInfo("fake", "fake", vocab_size, max_model_len, BLOCK_SIZE)

    def make_detokenizer(self, request: Request) -> Detokenizer:
        return IncrementalDetokenizer(self._tokenizer, request.prompt_token_ids[-16:], True)


async def serve(spec: dict[str, Any]) -> None:
    """`spec`: model (a folder with a tokenizer), layout, max_model_len, vocab_size, workers ([name, role] each)."""
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
    addresses = [await worker.start() for worker in workers]
    print(json.dumps([[a.worker_id, a.generation, a.target] for a in addresses]), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for worker in workers:
        await worker.stop()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
