"""The trace replay's arithmetic; the program itself runs against a cluster in tests/e2e."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def load(name: str) -> ModuleType:
    """A module of bench/, which is a folder of programs and no package."""
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCH))


sse_client, traces = load("sse_client"), load("traces")
bench_serve = load("serve")


def test_traces_of_both_kinds_are_read(tmp_path: Path) -> None:
    mooncake = tmp_path / "t.jsonl"
    mooncake.write_text(json.dumps({"timestamp": 1500, "input_length": 700, "output_length": 9, "hash_ids": [0, 4]}))
    (request,) = traces.read_trace(str(mooncake))
    assert (request.arrival_s, request.input_tokens, request.output_tokens, request.prefix_ids) == (1.5, 700, 9, (0, 4))
    azure = tmp_path / "t.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.6805900,396,109\n"
    )
    first, second = traces.read_trace(str(azure))
    assert (first.arrival_s, second.arrival_s, second.input_tokens, second.output_tokens) == (0, 4.0, 396, 109)
    with pytest.raises(ValueError, match="ends in"):
        traces.read_trace("t.txt")


def test_scaled_requests_fit_the_model_and_reach_the_rate() -> None:
    requests = traces.scale(traces.generate(300, seed=1), max_model_len=2048, requests_per_s=10.0)
    assert max(r.input_tokens + r.output_tokens for r in requests) < 2048
    assert min(min(r.input_tokens, r.output_tokens) for r in requests) >= 1
    assert requests[-1].arrival_s == pytest.approx(30.0)
    assert traces.generate(300, seed=1) == traces.generate(300, seed=1) != traces.generate(300, seed=2)


def test_equal_prefix_ids_give_equal_tokens() -> None:
    a = traces.TraceRequest(0, 30, 1, (0, 1), 10)
    b = traces.TraceRequest(0, 30, 1, (0, 2), 10)
    left, right = (traces.prompt_tokens(r, i, 1000, seed=0) for i, r in enumerate((a, b)))
    assert left[:10] == right[:10] and left[10:] != right[10:] and len(left) == len(right) == 30


def test_the_summary_counts_what_the_client_saw() -> None:
    requests = [traces.TraceRequest(0, 10, 3), traces.TraceRequest(0, 10, 5), traces.TraceRequest(0, 10, 2)]
    handoff = {"transport": "shm", "kv_bytes": 2**20, "transfer_s": 0.002, "cached_tokens": 5}
    quick = sse_client.Measured(
        0.0, [0.1, 0.2, 0.3], [1, 1, 1], 0.3, {"completion_tokens": 3, "prompt_tokens": 10}, {"choices": [handoff]}
    )
    slow = sse_client.Measured(
        0.0, [3.0, 4.0], [1, 4], 4.0, {"completion_tokens": 5, "prompt_tokens": 10}, {"choices": [handoff | {"transport": "local"}]}
    )  # fmt: skip
    broken = sse_client.Measured(0.0, [], [], 1.0, error="HTTP 500")
    result = bench_serve.summarize([quick, slow, broken], requests, (2000.0, 200.0))
    assert (result["requests"], result["failed"], result["wrong_length"]) == (3, 1, 1)
    assert result["ttft_ms"] == {"p50": 100.0, "p90": 3000.0, "p99": 3000.0}
    assert result["tpot_ms"]["p50"] == pytest.approx(100.0) and result["tpot_ms"]["p99"] == pytest.approx(250.0)
    assert result["output_tokens_per_s"] == 2.0 and result["goodput_share"] == pytest.approx(0.333)
    assert result["cached_input_share"] == 0.5
    assert (
        result["handoffs"]["remote"] == 1 and result["handoffs"]["local"] == 1 and result["handoffs"]["kv_mib"] == 1.0
    )
