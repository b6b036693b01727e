"""A conversation's next prompt begins with the tokens that were generated, and finds their KV, with the shipped model in this process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.llm import LLM, SamplingParams
from cluster.local_backend import LocalBackend
from router.api.app import create_app
from router.api.turns import Turns
from router.config import ApiConfig
from workers.config import WorkerConfig
from workers.model.loading import ServedModel
from workers.text.tokenizer import Tokenizer

MODEL = str(Path(__file__).resolve().parents[2] / "models" / "ernie-4.5-tiny")
CONFIG = WorkerConfig(MODEL, kv_memory_bytes=64_000_000)
NUM_TURNS, LENGTH = 10, 70
ASKED = {"temperature": 0.7, "seed": 5, "max_tokens": LENGTH, "min_tokens": LENGTH, "return_token_ids": True}


@asynccontextmanager
async def serving(turn_memory_bytes: int) -> AsyncIterator[httpx.AsyncClient]:
    backend = LocalBackend(CONFIG, ServedModel.load(CONFIG))
    backend.start()
    try:
        app = create_app(backend, Tokenizer.load(MODEL), ApiConfig(turn_memory_bytes=turn_memory_bytes))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None) as client:
            yield client
    finally:
        await backend.stop()


async def ask(client: httpx.AsyncClient, messages: list[dict[str, str]], stream: bool, key: str = "") -> dict[str, Any]:
    """Text, prompt and output ids, and cached tokens."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    body = {
        **ASKED,
        "messages": messages,
        "stream": stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }
    answer = await client.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    if not stream:
        whole = answer.json()
        (choice,) = whole["choices"]
        text, ids, prompt, usage = (
            choice["message"]["content"],
            choice["token_ids"],
            whole["prompt_token_ids"],
            whole["usage"],
        )
    else:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        events = [json.loads(line) for line in lines[:-1]]
        pieces = [event["choices"][0] for event in events if event["choices"]]
        text = "".join(piece["delta"].get("content", "") for piece in pieces)
        ids = [token_id for piece in pieces for token_id in piece["token_ids"]]
        prompt, usage = events[0]["prompt_token_ids"], events[-1]["usage"]
    return {"text": text, "ids": ids, "prompt": prompt, "cached": usage["prompt_tokens_details"]["cached_tokens"]}


async def talk(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    messages: list[dict[str, str]] = []
    turns = []
    for number in range(NUM_TURNS):
        messages.append({"role": "user", "content": f"And what is {number} + 25?"})
        turns.append(await ask(client, messages, stream=number % 2 == 0))
        messages.append({"role": "assistant", "content": turns[-1]["text"]})
    return turns


async def test_what_was_generated_is_hit_in_the_next_turn_and_changes_no_token() -> None:
    async with serving(1 << 20) as client:
        turns = await talk(client)
    async with serving(0) as client:
        plain = await talk(client)
    tokenizer = Tokenizer.load(MODEL)
    for before, after in pairwise(turns):
        known = [*before["prompt"], *before["ids"]]
        assert after["prompt"][: len(known)] == known, "the tokens as they were"
        assert after["cached"] == (len(known) - 1) // 64 * 64, "all full blocks, those of the output included"
    assert turns[0]["prompt"] == plain[0]["prompt"]
    cached, cached_plain = (sum(turn["cached"] for turn in one) for one in (turns, plain))
    share, share_plain = (
        total / sum(len(turn["prompt"]) for turn in one) for total, one in ((cached, turns), (cached_plain, plain))
    )
    print(f"cached {cached} ({share:.0%}) with the memory of turns, {cached_plain} ({share_plain:.0%}) without")
    assert cached > cached_plain
    llm = LLM(MODEL, kv_memory_bytes=64_000_000, prefix_cache=False)
    params = SamplingParams(temperature=0.7, seed=5, max_tokens=LENGTH, min_tokens=LENGTH)
    for turn in (*turns, *plain):
        (fresh,) = llm.generate([turn["prompt"]], params, progress=False)
        assert fresh.outputs[0].token_ids == turn["ids"], "as an engine that has no KV gives for this prompt"
    history = [{"role": "user", "content": "And what is 0 + 25?"}, {"role": "assistant", "content": turns[0]["text"]}]
    history.append({"role": "user", "content": "And what is 1 + 25?"})
    assert tokenizer.decode(turns[1]["prompt"]) == tokenizer.decode(
        tokenizer.encode(tokenizer.render_chat(history), False)
    )


async def test_turns_belong_to_a_key_and_an_edited_one_is_not_found() -> None:
    async with serving(1 << 20) as client:
        question = [{"role": "user", "content": "And what is 0 + 25?"}]
        first = await ask(client, question, stream=False, key="a")
        history = [*question, {"role": "assistant", "content": first["text"]}, {"role": "user", "content": "Why?"}]
        same, other = [await ask(client, history, stream=False, key=key) for key in ("a", "b")]
        known = [*first["prompt"], *first["ids"]]
        assert same["prompt"][: len(known)] == known != other["prompt"][: len(known)]
        history[1]["content"] += "!"
        edited = await ask(client, history, stream=False, key="a")
        assert edited["prompt"][: len(known)] != known


def test_the_memory_of_turns_is_bounded() -> None:
    turns = Turns(Tokenizer.load(MODEL), max_bytes=100)
    for number in range(50):
        turns.put(bytes([number]) * 24, b"me", bytes(40))
        turns.put(bytes([number]) * 24, b"me", bytes(40))
    assert turns._bytes.total == 80 and list(turns._turns) == [bytes([number]) * 24 for number in (48, 49)]
    turns.put(b"x", b"me", bytes(101))
    assert len(turns._turns) == 2


def test_who_has_many_turns_pushes_out_nobody_else_s(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(MODEL)
    by_bytes = Turns(tokenizer, max_bytes=80)
    monkeypatch.setattr("router.api.turns.MAX_TURNS", 4)
    by_count = Turns(tokenizer, max_bytes=10_000)
    for turns in (by_bytes, by_count):
        turns.put(b"yours", b"you", bytes(20))
        for number in range(50):
            turns.put(bytes([number]), b"me", bytes(20))
        assert list(turns._turns) == [b"yours", *(bytes([number]) for number in range(47, 50))]
