"""A request that asks for nothing special runs no code of what it does not ask for, and little of the rest."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from builders import fake_runner, make_engine, make_request, run_to_end
from fake_backend import CHECKPOINT, FakeBackend
from starlette.testclient import TestClient

from router.api.app import create_app
from router.config import ApiConfig
from workers.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MAX_CALLS_OF_A_TOKEN = 45


@contextmanager
def files_run(trace: Callable[[Any], None]) -> Iterator[set[str]]:
    """The files of the repository whose functions run meanwhile, where `trace` sets the hook: sys.setprofile, or threading.setprofile for
    threads that begin from now on."""
    seen: set[str] = set()

    def hook(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            seen.add(str(Path(frame.f_code.co_filename).relative_to(ROOT)))

    trace(hook)
    try:
        yield seen
    finally:
        trace(None)


def test_a_plain_chat_runs_nothing_of_tools_grammars_tenants_turns_and_logs() -> None:
    tokenizer = Tokenizer.load(str(CHECKPOINT))
    backend = FakeBackend(tokenizer)
    client = TestClient(create_app(backend, tokenizer, ApiConfig()), "http://127.0.0.1", client=("127.0.0.1", 50_000))
    assert backend.model is not None
    plain = {"model": backend.model.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

    def ask(**fields: Any) -> set[str]:
        with files_run(threading.setprofile) as seen:
            assert client.post("/v1/chat/completions", json=plain | fields).status_code == 200
        return seen

    ask(stream=True)  # what is worked out once
    seen = ask(stream=True)
    assert "router/api/speech.py" in seen and "router/api/translate.py" in seen
    unused = {
        f"router/api/{name}.py" for name in ("structure", "tools", "grammar_check", "turns", "access_log", "retelling")
    }
    assert not seen & unused
    assert not [
        file for file in seen if file.startswith(("router/api/formats/", "router/tenants/", "workers/grammar/"))
    ]
    assert "router/api/tools.py" in ask(enable_thinking=False)
    assert "router/tenants/salts.py" in ask(cache_salt="mine")
    assert {"router/api/structure.py", "router/api/grammar_check.py"} <= ask(guided_choice=["a", "b"])


def test_steps_without_grammars_ask_for_none() -> None:
    engine = make_engine()
    with files_run(sys.setprofile) as seen:
        engine.add(1, make_request(range(10, 40), 5))
        run_to_end(engine)
    assert "workers/scheduler/scheduler.py" in seen
    assert not [file for file in seen if file.startswith(("workers/grammar/", "workers/kv_tiers/"))]


def test_a_token_costs_an_engine_few_calls_however_many_decode() -> None:
    """Of Python and of what it calls: their number says how long the interpreter is held, on any machine."""

    def calls_of_a_token(num_sequences: int) -> float:
        engine = make_engine(
            fake_runner(4 * num_sequences), max_num_seqs=num_sequences, overlap_steps=False, max_decode_pause_s=60.0
        )
        for number in range(num_sequences):
            engine.add(number, make_request(range(10, 40), 60))
        num_calls, num_steps = 0, 8
        while engine.load().num_running < num_sequences:
            engine.step()

        def hook(frame: FrameType, event: str, argument: object) -> None:
            nonlocal num_calls
            is_model = frame.f_code.co_filename.endswith("fake_runner.py")
            num_calls += event in ("call", "c_call") and not is_model

        sys.setprofile(hook)
        try:
            for _ in range(num_steps):
                engine.step()
        finally:
            sys.setprofile(None)
        return num_calls / num_steps / num_sequences

    few, many = calls_of_a_token(8), calls_of_a_token(64)
    assert many <= few and many < MAX_CALLS_OF_A_TOKEN, (few, many)
