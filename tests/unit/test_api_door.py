"""Who may ask for what: with keys, without keys, from a web page, from another host; and that keys are shown nowhere."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_backend import MESSAGES, MODEL, Api, open_api
from starlette.datastructures import Headers

from cluster.cli import make_parser
from cluster.commands.flags import client_target, config_from
from router.api.door import Door
from router.api.problems import Rejected
from router.config import ApiConfig, RouterConfig, hashed, is_loopback
from router.tenants.config import TenantsConfig
from router.tenants.tenancy import Tenancy
from workers.errors import InvalidConfig

OPEN = ("/health", "/ready", "/version")
GUARDED = ("/v1/models", "/nothing", "/tokenize", "/v1/chat/completions", "//admin/status", "/administrators")

JSON_HEADER = {"content_type": "application/json"}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def door_says(config: ApiConfig, path: str, client: str = "127.0.0.1", method: str = "GET", **headers: str) -> int:
    """200 where the door lets it pass."""
    named = {name.replace("_", "-"): value for name, value in ({"host": "127.0.0.1:8000"} | headers).items()}
    scope: dict[str, Any] = {"type": "http", "path": path, "method": method, "client": (client, 5)}
    try:
        Door(config, Tenancy(TenantsConfig(), config.api_keys)).check(scope, Headers(named))
    except Rejected as rejection:
        return rejection.problem.row.status
    return 200


def test_without_the_right_key_nothing_but_what_monitors_ask_is_served() -> None:
    with open_api(ApiConfig(api_keys=("alpha", hashed("beta"))), key="beta") as api:
        assert api.client.models.list().data
        for key in ("gamma", "alphabeta", "alph", hashed("beta"), hashed("alpha").removeprefix("sha256:")):
            for path in GUARDED:
                response = api.http.get(path, headers=bearer(key))
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["x-request-id"] and response.headers["x-should-retry"] == "false"
            for path in (*OPEN, "/metrics"):
                assert api.http.get(path, headers=bearer(key)).status_code == 200
        assert api.http.get("/v1/models", headers={"authorization": "Basic beta"}).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            api.client.with_options(api_key="gamma").completions.create(model=MODEL.name, prompt="Hi")
        assert not api.backend.requests


def test_admin_takes_admin_keys_and_no_others() -> None:
    both = ApiConfig(api_keys=("user",), admin_keys=("root",))
    assert door_says(both, "/admin/status", authorization="Bearer root") == 200
    assert door_says(both, "/admin/status", authorization="Bearer user") == 401
    assert door_says(both, "/v1/models", authorization="Bearer root") == 401
    assert door_says(ApiConfig(api_keys=("user",)), "/admin/status", authorization="Bearer user") == 403
    one = ApiConfig(admin_keys=("root",))
    assert door_says(one, "/admin/status") == 401 and door_says(one, "/v1/models") == 200


def test_metrics_may_ask_for_a_key_of_either_kind() -> None:
    config = ApiConfig(api_keys=("user",), admin_keys=("root",), metrics="key")
    assert [door_says(config, "/metrics", authorization=f"Bearer {key}") for key in ("user", "root", "x")] == [
        200,
        200,
        401,
    ]
    assert door_says(ApiConfig(api_keys=("user",)), "/metrics") == 200


@pytest.mark.parametrize("path", ["/v1/models", "/admin/status", "/metrics", "/openapi.json"])
def test_without_keys_a_name_that_was_made_to_point_here_is_refused(path: str) -> None:
    for host in (
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "",
        "[",
        "a@b",
    ):
        assert door_says(ApiConfig(), path, host=host) == 403, host
    for host in ("127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "127.1.2.3", "api.localhost"):
        assert door_says(ApiConfig(), path, host=host) == 200, host
    proxied = ApiConfig(allowed_hosts=("Baton.internal",))
    assert door_says(proxied, path, host="baton.internal:80") == 200
    assert door_says(ApiConfig(api_keys=("k",)), "/v1/models", host="evil.example", authorization="Bearer k") == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://["},
        {"origin": "https://127.0.0.1.evil.example"},
        {"sec_fetch_site": "cross-site"},
    ],
)
def test_without_keys_a_foreign_web_page_is_refused(headers: dict[str, str]) -> None:
    assert door_says(ApiConfig(), "/v1/chat/completions", method="POST", **JSON_HEADER, **headers) == 403
    assert door_says(ApiConfig(insecure=True), "/v1/chat/completions", method="POST", **JSON_HEADER, **headers) == 403
    assert door_says(ApiConfig(), "/admin/status", **headers) == 403
    assert door_says(ApiConfig(admin_keys=("root",)), "/admin/status", authorization="Bearer root", **headers) == 403


def test_a_page_of_this_host_may_ask_but_admin_takes_its_own_page_alone() -> None:
    for origin in ("http://localhost:3000", "http://127.0.0.1:8000", "http://[::1]:5"):
        assert door_says(ApiConfig(), "/v1/chat/completions", method="POST", **JSON_HEADER, origin=origin) == 200
        is_own = origin == "http://127.0.0.1:8000"
        assert door_says(ApiConfig(), "/admin/status", origin=origin) == (200 if is_own else 403)
    assert door_says(ApiConfig(), "/admin/status", sec_fetch_site="none") == 200, "an address that somebody typed"
    own = {"origin": "http://127.0.0.1:8000", "sec_fetch_site": "same-origin"}
    keyed = ApiConfig(admin_keys=("root",))
    assert door_says(ApiConfig(), "/admin/workers/decode-0/drain", method="POST", **JSON_HEADER, **own) == 200
    assert door_says(keyed, "/admin/status", **own) == 401
    assert door_says(keyed, "/admin/status", **own, authorization="Bearer root") == 200
    for foreign in (
        {"sec_fetch_site": "same-site"},
        {**own, "sec_fetch_site": "cross-site"},
        {**own, "origin": "https://127.0.0.1:9"},
    ):
        assert door_says(keyed, "/admin/status", authorization="Bearer root", **foreign) == 403
    # A page whose name was made to point here is its own page to the browser, and has another Host.
    rebound = {"origin": "http://evil.example:8000", "host": "evil.example:8000", "sec_fetch_site": "same-origin"}
    assert door_says(ApiConfig(), "/admin/status", **rebound) == 403


def test_the_operators_page_is_served_to_whoever_may_show_a_key() -> None:
    assert door_says(ApiConfig(admin_keys=("root",)), "/admin/ui", client="10.0.0.7", host="baton.example") == 200
    assert door_says(ApiConfig(api_keys=("user",)), "/admin/ui") == 403, "there is no key that would open anything"
    assert door_says(ApiConfig(), "/admin/ui") == 200
    assert door_says(ApiConfig(), "/admin/ui", client="10.0.0.7") == 403


def test_without_keys_another_host_is_refused_and_served_where_that_was_asked_for_but_not_admin() -> None:
    for client in ("10.0.0.7", "::ffff:10.0.0.7", "2001:db8::1"):
        assert door_says(ApiConfig(), "/v1/models", client=client) == 403
        assert door_says(ApiConfig(insecure=True), "/v1/models", client=client, host="baton.example") == 200
        assert door_says(ApiConfig(insecure=True), "/admin/status", client=client) == 403
    assert door_says(ApiConfig(), "/v1/models", client="::ffff:127.0.0.1") == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonx"]
)
def test_a_body_that_a_web_page_may_send_unasked_is_415(api: Api, kind: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/admin/workers/decode-0/drain"):
        response = api.http.post(path, content=b"{}", headers={"content-type": kind})
        assert response.status_code == 415 and response.json()["error"]["code"] == "unsupported_media_type"
    assert not api.backend.drained
    body = b'{"prompt":"a"}'
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        assert api.http.post("/v1/completions", content=body, headers={"content-type": kind}).status_code == 200


def test_a_web_page_drains_no_worker(api: Api) -> None:
    foreign = {"origin": "https://evil.example", "host": "evil.example", "sec-fetch-site": "cross-site"}
    assert api.http.post("/admin/workers/decode-0/drain", json={}, headers=foreign).status_code == 403
    assert api.http.post("/v1/chat/completions", json={"messages": MESSAGES}, headers=foreign).status_code == 403
    assert not api.backend.drained and not api.backend.requests


def test_other_hosts_are_listened_to_only_with_keys_or_on_demand() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "baton.example"):
        assert not is_loopback(host)
        with pytest.raises(InvalidConfig, match="--insecure"):
            RouterConfig("m", host=host)
        with pytest.raises(InvalidConfig, match="--insecure"):
            RouterConfig("m", host=host, api=ApiConfig(admin_keys=("root",)))
        RouterConfig("m", host=host, api=ApiConfig(insecure=True))
        RouterConfig("m", host=host, api=ApiConfig(api_keys=("k",)))
    for host in ("127.0.0.1", "localhost", "::1"):
        RouterConfig("m", host=host)


# ---- where keys come from ----


def parsed(*arguments: str) -> argparse.Namespace:
    return make_parser().parse_args(arguments)


def test_keys_come_from_files_or_the_environment(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# of the first team\n\n one \ntwo\n")
    (tmp_path / "admins").write_text("root\n")
    files = ("--api-key-file", str(tmp_path / "keys"), "--admin-key-file", str(tmp_path / "admins"))
    api = config_from(parsed("serve", *files), {"BATON_API_KEY": "not this"}).router.api
    assert api.api_keys == (hashed("one"), hashed("two")) and api.admin_keys == (hashed("root"),)
    api = config_from(parsed("serve"), {"BATON_API_KEY": "three", "BATON_ADMIN_KEY": "boss"}).router.api
    assert api.api_keys == (hashed("three"),) and api.admin_keys == (hashed("boss"),)
    environment = {"BATON_API_KEY": "three", "BATON_ADMIN_KEY": "boss"}
    here = ("--url", "http://127.0.0.1:8000")  # whatever clusters run on this host
    assert client_target(parsed("chat", *here), environment)[1] == "three"
    assert client_target(parsed("chat", *here, "--api-key-file", str(tmp_path / "keys")), environment)[1] == "one"
    for command in (("status",), ("drain", "decode-0"), ("switch-role", "decode-0", "mixed")):
        assert client_target(parsed(*command, *here), environment)[1] == "boss"


def test_a_file_without_a_key_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# nothing\n")
    for name, what in (("empty", "there is no key"), ("nowhere", "cannot read the keys")):
        with pytest.raises(InvalidConfig, match=what):
            config_from(parsed("serve", "--api-key-file", str(tmp_path / name)), {})


def test_the_processes_that_it_starts_inherit_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BATON_API_KEY", "BATON_ADMIN_KEY", "BATON__ROUTER__API__ADMIN_KEYS"):
        monkeypatch.setenv(name, "very-secret")
    config_from(parsed("serve"))
    assert "very-secret" not in os.environ.values()


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--api-key", "very-secret"),
        ("router", "--name", "r", "--api-key=very-secret"),
        ("chat", "--api-key", "very-secret"),
        ("serve", "--set", "router.api.api_keys=very-secret"),
        ("serve", "--set", 'router.api.admin_keys=["very-secret"]'),
    ],
)
def test_a_key_on_the_command_line_is_refused_and_not_repeated(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", "cluster.cli", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "can read a command line" in done.stderr
    assert "very-secret" not in done.stdout + done.stderr
