"""/openapi.json says what is there, and the API does what it says: schemathesis asks everything, right and wrong, and reads the answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fake_backend import MESSAGES, Api, open_api

from router.api.app import create_app
from router.api.endpoints import ENDPOINTS
from router.api.plain_route import plain_endpoints
from router.config import ApiConfig

CONFIG = ApiConfig(api_keys=("key",), admin_keys=("key",), max_n=4, max_prompts=4, max_choices=8)
EXAMPLES = int(os.environ.get("BATON_FUZZ_EXAMPLES", "1000")) // 100
"""Random bodies for each endpoint, beside those at the edges of its schema."""


@pytest.fixture(scope="module")
def keyed() -> Iterator[Api]:
    with open_api(CONFIG, key="key") as api:
        yield api


def test_every_endpoint_answers_as_the_document_says(keyed: Api, tmp_path: Path) -> None:
    """positive_data_acceptance stays out: a body that fits its schema may ask for more than the context holds, or for things that do
    not go together."""
    settings = tmp_path / "schemathesis.toml"
    settings.write_text('[parameters]\nworker_id = "decode-0"\nname = "ernie-tiny"\n')
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "--config-file",
        str(settings),
        "run",
        f"{keyed.url}/openapi.json",
    ]
    options = ["--exclude-checks", "positive_data_acceptance", "--max-examples", str(EXAMPLES), "--seed", "1"]
    options += ["--phases", "examples,coverage,fuzzing", "--header", "Authorization: Bearer key", "--no-color"]
    run = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2000:]


def test_the_document_names_every_endpoint_and_no_other(keyed: Api) -> None:
    app = create_app(keyed.backend, keyed.backend.tokenizer, CONFIG)
    there = {(method, path) for path, operations in app.openapi()["paths"].items() for method in operations}
    there |= {(method.lower(), path) for method, path in plain_endpoints(app.router)}
    assert there == {(endpoint.method, endpoint.path) for endpoint in ENDPOINTS}


def events(api: Api, path: str, body: dict[str, Any]) -> list[Any]:
    text = api.http.post(path, json={**body, "stream": True}).text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("/v1/chat/completions", "ChatCompletion", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", "TextCompletion", {"prompt": "Hi", "logprobs": 2, "echo": True}),
    ],
)
def test_whole_answers_and_events_of_streams_have_the_form_that_is_described(
    keyed: Api, path: str, kind: str, body: dict[str, Any]
) -> None:
    keyed.backend.reset()
    schemas = keyed.http.get("/openapi.json").json()["components"]["schemas"]

    def check(name: str, answer: Any) -> None:
        jsonschema.validate(answer, {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}})

    asked = {**body, "n": 2, "prompt_logprobs": 1, "return_token_ids": True, "trace": True, "max_tokens": 3}
    check(kind, keyed.http.post(path, json=asked).json())
    options = {"include_usage": True, "continuous_usage_stats": True}
    streamed = events(keyed, path, {**asked, "stream_options": options})
    assert len(streamed) > 4
    for event in streamed:
        check("ChatCompletionChunk" if kind == "ChatCompletion" else kind, event)


def test_the_page_loads_nothing_and_runs_nothing(keyed: Api) -> None:
    page = keyed.http.get("/docs")
    assert page.status_code == 200 and page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "<script" not in page.text and "src=" not in page.text and "http" not in page.text
    for endpoint in ENDPOINTS:
        assert f"{endpoint.method.upper()} {endpoint.path}<" in page.text


def test_the_document_is_open_or_asks_for_a_key_as_settings_say() -> None:
    for docs, status in (("open", 200), ("key", 401)):
        with open_api(ApiConfig(api_keys=("key",), docs=docs), key="key") as api:  # type: ignore[arg-type]
            for path in ("/docs", "/openapi.json"):
                assert api.http.get(path, headers={"authorization": ""}).status_code == status
                assert api.http.get(path).status_code == 200
