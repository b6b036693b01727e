"""Requests to replay: from a Mooncake JSONL or Azure CSV file, or from a seeded generator with like statistics."""

from __future__ import annotations

import csv
import json
import math
import random
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

MOONCAKE_BLOCK = 512
"""Prompt tokens behind one hash id of a Mooncake trace."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: when it arrives (seconds from the start), what it asks for, and which prefix it shares.

    `prefix_ids` name consecutive pieces of the prompt of `prefix_tokens` tokens each; equal ids mean equal tokens.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()
    prefix_tokens: int = MOONCAKE_BLOCK


def read_trace(path: str) -> list[TraceRequest]:
    """Reads a trace file by its ending: .jsonl (Mooncake) or .csv (Azure). Raises ValueError for another one."""
    match Path(path).suffix:
        case ".jsonl":
            return _read_mooncake(path)
        case ".csv":
            return _read_azure(path)
        case other:
            raise ValueError(f"{path}: a trace ends in .jsonl (Mooncake) or .csv (Azure), not {other!r}")


def _read_mooncake(path: str) -> list[TraceRequest]:
    requests = []
    with open(path) as lines:
        for line in lines:
            row = json.loads(line)
            requests.append(
                TraceRequest(row["timestamp"] / 1000, row["input_length"], row["output_length"], tuple(row["hash_ids"]))
            )
    return requests


def _read_azure(path: str) -> list[TraceRequest]:
    with open(path, newline="") as file:
        rows = [
            # The files have seven digits of fraction; datetime reads six.
            (datetime.fromisoformat(row["TIMESTAMP"][:26]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(file)
        ]
    start = min(row[0] for row in rows)
    return [TraceRequest((when - start).total_seconds(), inputs, outputs) for when, inputs, outputs in rows]


def generate(count: int, seed: int) -> list[TraceRequest]:
    """Conversations with the statistics of the Mooncake conversation trace, measured on its 12,031 requests.

    Log-normal lengths (input: mean of the logarithm 8.74, deviation 1.20; output: 5.34 and 1.36) cut at the longest of the
    trace, exponential gaps of 0.294 s on average, and 65 % of the requests try to continue an earlier one, whose blocks of
    512 tokens they share: a third of all prompt blocks is then a repeated prefix (0.33 in the trace and here).
    """
    rng = random.Random(seed)
    requests: list[TraceRequest] = []
    now, next_id = 0.0, 1
    for _ in range(count):
        now += rng.expovariate(1 / 0.294)
        inputs = min(max(1, round(rng.lognormvariate(8.74, 1.20))), 126_195)
        outputs = min(max(1, round(rng.lognormvariate(5.34, 1.36))), 2_000)
        shared: tuple[int, ...] = (0,)
        if requests and rng.random() < 0.65:
            earlier = [r for r in rng.choices(requests[-200:], k=4) if r.input_tokens <= inputs]
            shared = max(earlier, key=lambda r: r.input_tokens).prefix_ids if earlier else shared
        num_blocks = math.ceil(inputs / MOONCAKE_BLOCK)
        fresh = max(0, num_blocks - len(shared))
        ids = shared[:num_blocks] + tuple(range(next_id, next_id + fresh))
        next_id += fresh
        requests.append(TraceRequest(now, inputs, outputs, ids))
    return requests


def scale(requests: list[TraceRequest], max_model_len: int, requests_per_s: float | None) -> list[TraceRequest]:
    """Fits lengths to the model and arrivals to a rate, keeping their shape.

    Lengths shrink by one factor, so that 95 % of the requests fit the context; the longest are cut. Gaps are
    stretched by one factor to reach `requests_per_s` on average (None: as recorded).
    """
    totals = sorted(r.input_tokens + r.output_tokens for r in requests)
    factor = min(1.0, (max_model_len - 1) / totals[min(len(totals) - 1, int(0.95 * len(totals)))])
    span = max(r.arrival_s for r in requests) - min(r.arrival_s for r in requests)
    pace = 1.0 if requests_per_s is None or span == 0 else len(requests) / span / requests_per_s
    start = min(r.arrival_s for r in requests)
    scaled = []
    for request in requests:
        inputs = max(1, min(round(request.input_tokens * factor), max_model_len - 2))
        outputs = max(1, min(round(request.output_tokens * factor), max_model_len - 1 - inputs))
        piece = max(1, round(request.prefix_tokens * factor))
        arrival = (request.arrival_s - start) * pace
        scaled.append(TraceRequest(arrival, inputs, outputs, request.prefix_ids, piece))
    return sorted(scaled, key=lambda r: r.arrival_s)


def prompt_tokens(request: TraceRequest, index: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids for a prompt: pseudo-random, equal where prefix ids are equal, avoiding the lowest ids (specials)."""
    tokens: list[int] = []
    for prefix_id in request.prefix_ids:
        if len(tokens) >= request.input_tokens:
            break
        rng = random.Random(f"{seed}/{prefix_id}")
        tokens += [rng.randrange(300, vocab_size) for _ in range(request.prefix_tokens)]
    rng = random.Random(f"{seed}/own/{index}")
    while len(tokens) < request.input_tokens:
        tokens.append(rng.randrange(300, vocab_size))
    return tokens[: request.input_tokens]
