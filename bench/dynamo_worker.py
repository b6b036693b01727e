"""A stand-in worker for Dynamo's front end, to be run by a Python that has `ai-dynamo`: tokens at a rate, without a model.

python bench/dynamo_worker.py INTERVAL_S CHECKPOINT

It registers in the folder that DYN_FILE_KV names; a request's first token comes at once.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvloop
from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
from dynamo.runtime import DistributedRuntime

TOKEN = 1234


async def main(interval_s: float, checkpoint: str) -> None:
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    endpoint = runtime.endpoint("dynamo.backend.generate")

    async def generate(request: dict[str, Any], context: Any = None) -> AsyncIterator[dict[str, Any]]:
        num_tokens = (request.get("stop_conditions") or {}).get("max_tokens") or 16
        for number in range(num_tokens):
            output: dict[str, Any] = {"token_ids": [TOKEN], "index": 0}
            if number == num_tokens - 1:
                output["finish_reason"] = "length"
            yield output
            await asyncio.sleep(interval_s)

    await register_model(
        ModelInput.Tokens,
        ModelType.Chat,
        endpoint,
        checkpoint,
        "model",
        worker_type=WorkerType.Aggregated,
        kv_cache_block_size=64,
        ignore_weights=True,
    )
    await endpoint.serve_endpoint(generate)


if __name__ == "__main__":
    uvloop.run(main(float(sys.argv[1]), sys.argv[2]))
