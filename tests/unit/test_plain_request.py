"""A request that asks for nothing special runs no code of what it does not ask for."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from builders import make_engine, make_request, run_to_end
from fake_backend import CHECKPOINT, FakeBackend
from starlette.testclient import TestClient

from router.api.app import create_app
from router.config import ApiConfig
from workers.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


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
