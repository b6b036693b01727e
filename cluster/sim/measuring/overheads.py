"""Measures what a request costs beside its computation: router and streams, the handoff's control messages, KV bytes.

A real router and real workers, in processes of their own, compute nothing: a fake runner stands for the model, over a KV pool of the
model's shape. What is left of a request's time is overhead.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

import numpy as np

from cluster.sim.measuring.worker_process import worker_process
from router.config import RouterConfig
from router.server import RouterServer
from workers.errors import BatonError
from workers.kv_memory.memory import KvLayout
from workers.runner import BLOCK_SIZE

ROUTER_HOPS = 4
"""Client to router, router to worker, and both back: what a simulation charges `router_s` for."""
HANDOFF_HOPS = 5
"""Open, accept with an offer, choose a transport, announce, and the first piece: one after another before a first token."""
START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Overheads:
    """Seconds one way, and bytes a second. `samples` are the medians they were made of: prompt tokens, here, handed over."""

    router_s: float
    router_token_s: float
    """What a prompt token adds to a request that is computed where it decodes."""
    connect_s: float
    """What a connection of its own adds to a request."""
    control_latency_s: float
    transfer_latency_s: float
    transfer_bytes_per_s: float
    transport: str
    samples: tuple[tuple[int, float, float], ...]


def measure_overheads(
    model: str, layout: KvLayout, max_model_len: int, vocab_size: int, repeats: int, say: Callable[[str], None]
) -> Overheads:
    """Raises BatonError when a process does not start or a request fails."""
    longest = min(max_model_len - BLOCK_SIZE, max(BLOCK_SIZE, (256 << 20) // (layout.block_bytes // BLOCK_SIZE)))
    lengths = sorted({min(longest, length) for length in (BLOCK_SIZE, longest // 4, longest // 2, longest)})
    blocks = 2 * -(-longest // BLOCK_SIZE) + 8
    shape = {name: value for name, value in asdict(layout).items() if name not in ("layer_bytes", "block_bytes")}
    spec = {
        "model": model,
        "layout": {**shape, "num_blocks": blocks},
        "max_model_len": longest + BLOCK_SIZE,
        "vocab_size": vocab_size,
    }
    with ExitStack() as stack:
        say("starting a router and workers that compute nothing")
        here, prefill = stack.enter_context(
            worker_process({**spec, "workers": [["mixed-0", "mixed"], ["prefill-0", "prefill"]]})
        )
        (decode,) = stack.enter_context(worker_process({**spec, "workers": [["decode-0", "decode"]]}))
        router = RouterServer(RouterConfig(model, port=0, max_local_prefill_tokens=0), "profile")
        url = asyncio.run(router.start())
        stack.callback(lambda: asyncio.run(router.stop()))
        client = _Client(url, vocab_size)
        stack.callback(client.close)
        found: dict[str, list[float]] = {}
        for name, members in (("here", (here,)), ("handed over", (prefill, decode))):
            router.set_workers(members)
            _wait_for(router, len(members))
            say(f"measuring prompts that are {'computed where they decode' if name == 'here' else name}")
            found[name] = [client.median_s(length, repeats) for length in lengths]
            if name == "here":
                connected_s = client.median_s(lengths[0], repeats, is_kept=False)
        transport = client.transport
    connect_s = max(0.0, connected_s - found["here"][0])
    return _made_of(
        lengths, found["here"], found["handed over"], layout.block_bytes // BLOCK_SIZE, transport, connect_s
    )


def _made_of(
    lengths: list[int], here: list[float], over: list[float], token_bytes: int, transport: str, connect_s: float = 0.0
) -> Overheads:
    """The handoff's part is a line over the bytes: what it takes for none, and seconds a byte."""
    added = np.array([max(0.0, b - a) for a, b in zip(here, over, strict=True)])
    moved = np.array([-(-length // BLOCK_SIZE) * BLOCK_SIZE * token_bytes for length in lengths], dtype=np.float64)
    slope = intercept = 0.0
    if len(lengths) > 1:
        slope, intercept = (float(value) for value in np.polyfit(moved, added, 1))
    if slope <= 0:
        slope = float(added[-1] / moved[-1]) if added[-1] else 1e-12
    hop = max(intercept, float(added.min()) / 2, 1e-6) / HANDOFF_HOPS
    token_s = float(np.polyfit(lengths, here, 1)[0]) if len(lengths) > 1 else 0.0
    return Overheads(
        router_s=min(here) / ROUTER_HOPS,
        router_token_s=max(0.0, token_s),
        connect_s=connect_s,
        control_latency_s=hop,
        transfer_latency_s=hop,
        transfer_bytes_per_s=1 / slope,
        transport=transport,
        samples=tuple(zip(lengths, here, over, strict=True)),
    )


class _Client:
    """One connection, kept alive or made anew for each request; requests follow one another."""

    def __init__(self, url: str, vocab_size: int) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        self._vocab_size = vocab_size
        self._draw = random.Random(0)
        self.transport = ""

    def close(self) -> None:
        self._connection.close()

    def median_s(self, num_tokens: int, repeats: int, is_kept: bool = True) -> float:
        """Of requests for one token; the first three are not counted."""
        return statistics.median([self._ask(num_tokens, is_kept) for _ in range(repeats + 3)][3:])

    def _ask(self, num_tokens: int, is_kept: bool) -> float:
        prompt = [self._draw.randrange(10, self._vocab_size) for _ in range(num_tokens)]
        body = json.dumps({"prompt": prompt, "max_tokens": 1, "temperature": 0, "trace": True})
        if not is_kept:
            self._connection.close()  # the next request connects
        started = time.perf_counter()
        self._connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        elapsed = time.perf_counter() - started
        if answer.status != 200:
            raise BatonError(f"a request of {num_tokens} tokens failed: {text.decode(errors='replace'):.200}")
        choices = json.loads(text).get("baton", {}).get("choices", ())
        self.transport = choices[0].get("transport", "") if choices else self.transport
        return elapsed


def _wait_for(router: RouterServer, num_workers: int) -> None:
    """Until the router is connected to all of them. Raises BatonError."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        views = router.status().workers
        if len(views) == num_workers and all(view.connected for view in views):
            return
        time.sleep(0.05)
    raise BatonError(f"the router did not reach its {num_workers} workers within {START_TIMEOUT_S:.0f} s")
