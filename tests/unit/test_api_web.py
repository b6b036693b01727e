"""Web pages, proxies, monitors and old clients: CORS, HEAD, OPTIONS, a prefix of paths, HTTP/1.0; and the log of requests."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fake_backend import MESSAGES, Api, open_api

from cluster.sim.traces.files import read_trace
from router.api.access_log import AccessLog
from router.config import ApiConfig, CorsConfig
from workers.errors import InvalidConfig

PAGE = "https://chat.example.com"
ASK = {"prompt": "Hi", "max_tokens": 3}


def preflight(api: Api, path: str, origin: str = PAGE, method: str = "POST") -> tuple[int, str | None]:
    headers = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization",
    }
    answer = api.http.options(path, headers=headers)
    return answer.status_code, answer.headers.get("access-control-allow-origin")


@pytest.mark.parametrize("keys", [(), ("key",)])
def test_pages_that_are_named_may_call_the_api_and_no_others_and_never_admin(keys: tuple[str, ...]) -> None:
    config = ApiConfig(api_keys=keys, admin_keys=keys, cors=CorsConfig(origins=(PAGE,)))
    with open_api(config, key="key") as api:
        assert preflight(api, "/v1/chat/completions") == (200, PAGE)
        answer = api.http.post("/v1/completions", json=ASK, headers={"origin": PAGE})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        refused = api.http.post("/v1/completions", json={}, headers={"origin": PAGE})
        assert refused.status_code == 400 and refused.headers["access-control-allow-origin"] == PAGE, "a page reads why"
        assert preflight(api, "/v1/chat/completions", "https://evil.example.com")[1] is None
        assert preflight(api, "/v1/chat/completions", method="PATCH")[0] == 400
        foreign = api.http.post("/v1/completions", json=ASK, headers={"origin": "https://evil.example.com"})
        assert "access-control-allow-origin" not in foreign.headers and (keys or foreign.status_code == 403)
        for path in ("/admin", "/admin/workers/decode-0/drain"):
            assert preflight(api, path) == (403, None)
        assert api.http.post("/admin/workers/decode-0/drain", json={}, headers={"origin": PAGE}).status_code == 403


def test_every_page_may_call_only_an_api_with_keys() -> None:
    with pytest.raises(InvalidConfig, match=r"router\.api\.cors\.origins must name pages"):
        ApiConfig(cors=CorsConfig(origins=("*",)))


def test_head_is_answered_as_get_and_options_with_the_methods_of_a_path(api: Api) -> None:
    for path in ("/health", "/ready", "/v1/models", "/metrics", "/openapi.json"):
        head = api.http.head(path)
        assert head.status_code == 200 and not head.content
        if path != "/metrics":  # which grows
            assert head.headers["content-length"] == str(len(api.http.get(path).content))
    stream = api.http.head("/admin/status", headers={"accept": "text/event-stream"})
    assert stream.status_code == 200 and stream.headers["content-type"].startswith("text/event-stream")
    refused = api.http.head("/v1/completions")
    assert refused.status_code == 405 and refused.headers["allow"] == "OPTIONS, POST"
    assert api.http.head("/nothing").status_code == 404
    allowed = api.http.options("/v1/responses/resp_1")
    assert allowed.status_code == 204 and allowed.headers["allow"] == "DELETE, GET, HEAD, OPTIONS"
    assert api.http.options("/v1/completions").headers["allow"] == "OPTIONS, POST"
    assert api.http.options("/nothing").status_code == 404


def test_paths_are_the_same_with_a_proxys_prefix_and_without() -> None:
    with open_api(ApiConfig(api_keys=("key",), admin_keys=("other",), root_path="/baton"), key="key") as api:
        for prefix in ("/baton", ""):
            assert api.http.get(prefix + "/v1/models").status_code == 200
            assert api.http.post(prefix + "/v1/completions", json=ASK).status_code == 200
            assert api.http.get(prefix + "/admin/status").status_code == 401, "it is /admin with a prefix too"
        assert api.http.get("/batons/v1/models").status_code == 404
        assert api.http.get("/openapi.json").json()["servers"] == [{"url": "/baton"}]
    with pytest.raises(InvalidConfig, match="root_path must begin with a slash"):
        ApiConfig(root_path="baton")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_of_http_1_0_gets_its_answer_without_chunks(api: Api, stream: bool) -> None:
    body = json.dumps({**ASK, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    received = b""
    with socket.create_connection((urlsplit(api.url).hostname, urlsplit(api.url).port), timeout=30) as connection:
        connection.sendall(head.encode() + body)
        while part := connection.recv(1 << 16):
            received += part
    headers, _, content = received.partition(b"\r\n\r\n")
    assert b"200" in headers.splitlines()[0] and b"transfer-encoding" not in headers.lower()
    if stream:
        events = [line for line in content.decode().split("\n") if line and not line.startswith("id: ")]
        assert all(event.startswith("data: ") for event in events) and events[-1] == "data: [DONE]"
    else:
        assert json.loads(content)["choices"][0]["finish_reason"] == "length"


def test_the_log_of_requests_is_a_trace_and_holds_no_text(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    with open_api(ApiConfig(access_log="json", access_log_file=str(path))) as api:
        api.backend.cached_tokens = 16
        long = "a secret " * 400
        for _ in range(2):
            api.client.completions.create(model="ernie-tiny", prompt=[7] * 500, max_tokens=4, n=2)
        api.client.chat.completions.create(model="ernie-tiny", messages=MESSAGES, max_tokens=5, stream=True).close()
        api.http.get("/health")
        api.http.post("/v1/completions", json={"prompt": long})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert "secret" not in path.read_text()
    answers = [line for line in lines if line.get("output_length")]
    assert [(line["path"], line["input_length"], line["output_length"], line["choice"]) for line in answers[:4]] == [
        ("/v1/completions", 500, 4, choice) for choice in (0, 1, 0, 1)
    ]
    assert {tuple(line["hash_ids"]) for line in answers[:4]} == {tuple(answers[0]["hash_ids"])}, "one prompt"
    assert answers[0]["cached_tokens"] == 16 and 0 < answers[0]["ttft_s"] <= answers[0]["duration_s"]
    others = {(line["path"], line["status"], line["refusal"]) for line in lines if "choice" not in line}
    assert {("/health", 200, ""), ("/v1/completions", 400, "invalid_request")} <= others
    assert len(read_trace(path)) == len(answers)


def test_a_log_that_cannot_be_written_is_a_setting_to_change(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="access_log_file"):
        AccessLog(ApiConfig(access_log="json", access_log_file=str(tmp_path / "none" / "log")))
