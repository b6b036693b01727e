"""Keys that belong to tenants: who they let in, what openai's client hears of limits, what answers and the usage log say."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_backend import MESSAGES, MODEL, Api, FakeBackend, Hang, open_api, speak
from keeping_backend import KeepingBackend

from cluster.cli import main
from cluster.settings import build
from cluster.tenants.file import read_tenants
from router.config import ApiConfig, RouterConfig
from router.tenants.config import TenantLimits, TenantsConfig, UsageConfig
from router.tenants.roster import Key
from router.tenants.tenancy import Tenancy
from router.tenants.usage import Usage
from router.tenants.usage_log import UsageLog, read_usage
from workers.errors import InvalidConfig, Refusal, Refused
from workers.request import end_output

TENANTS = {
    "acme": TenantLimits(requests_per_min=3, input_tokens_per_min=1000, output_tokens_per_min=100_000),
    "small": TenantLimits(max_concurrent=1, models=("another-model",)),
    "single": TenantLimits(max_concurrent=1, output_tokens_per_min=10_000),
    "once": TenantLimits(max_concurrent=1, requests_per_min=2),
    "slow": TenantLimits(output_tokens_per_min=120),
    "polite": TenantLimits(min_priority=0, max_priority=10, weight=3.0),
}


def key(name: str, tenant: str = "", **more: Any) -> Key:
    return Key(name, tenant or name, hashlib.sha256(name.encode()).digest(), **more)


KEYS = (
    *(key(name) for name in TENANTS),
    key("stranger"),
    key("old", "acme", expires_s=86_400.0 * 365),
    key("stolen", "acme", revoked_s=86_400.0 * 366),
)


@contextmanager
def tenants(
    usage: Path | None = None,
    grace_s: float = 30.0,
    kind: type[FakeBackend] = FakeBackend,
    clock: Callable[[], float] = time.monotonic,
    **settings: Any,
) -> Iterator[Api]:
    config = TenantsConfig(enabled=True, **settings)
    api = ApiConfig(api_keys=("plain",), client_grace_s=grace_s)
    tenancy = Tenancy(config, api.api_keys, secret=b"s", clock=clock)
    tenancy.set_roster(TENANTS, KEYS)
    log = UsageLog(UsageConfig(str(usage)), "router-0") if usage else None
    with open_api(api, "acme", tenancy=tenancy, usage_log=log, kind=kind) as served:
        yield served
    if log is not None:
        log.close()


def ask(api: Api, key: str, **body: Any) -> httpx.Response:
    return api.http.post(
        "/v1/completions",
        json={"prompt": [1, 2, 3], "max_tokens": 4, **body},
        headers={"authorization": f"Bearer {key}"},
    )


def test_a_client_of_openai_is_told_how_much_is_left_and_when_to_come_again() -> None:
    with tenants() as api:
        remaining = []
        for _ in range(3):
            raw = api.client.with_raw_response.chat.completions.create(
                model=MODEL.name, messages=MESSAGES, max_tokens=2
            )
            remaining.append(int(raw.headers["x-ratelimit-remaining-requests"]))
            assert raw.headers["x-ratelimit-limit-requests"] == "3"
            assert raw.headers["x-ratelimit-reset-requests"].endswith("s")
            assert int(raw.headers["x-ratelimit-remaining-input-tokens"]) < 1000
            assert raw.headers["x-ratelimit-limit-tokens"] == "1000", "the scarcer of the two kinds"
        assert remaining == [2, 1, 0]
        with pytest.raises(openai.RateLimitError) as limited:
            api.client.completions.create(model=MODEL.name, prompt="Hi", stream=True)
        error, headers = limited.value, limited.value.response.headers
        assert error.code == "rate_limit_exceeded" and "3 requests a minute" in str(error)
        assert 15 <= int(headers["retry-after"]) <= 20 and headers["x-should-retry"] == "true"
        assert headers["x-ratelimit-remaining-requests"] == "0" and seconds(headers["x-ratelimit-reset-requests"]) >= 40
        assert len(api.backend.requests) == 3
        assert ask(api, "stranger").status_code == 200, "another tenant is not touched"


def seconds(text: str) -> float:
    minutes, _, rest = text.rpartition("m") if not text.endswith("ms") else ("", "", text)
    return 60 * float(minutes or 0) + float(rest.rstrip("s"))


def test_what_a_request_did_not_use_is_given_back_and_what_cannot_be_is_refused_for_good() -> None:
    with tenants() as api:
        assert ask(api, "acme", model="nobody").status_code == 404
        too_long = ask(api, "acme", prompt=[[5] * 300] * 4, max_tokens=1)
        assert (too_long.status_code, too_long.headers["x-should-retry"]) == (429, "false")
        assert "retry-after" not in too_long.headers
        api.backend.refusals[0] = Refused(Refusal.QUEUE_FULL, "full")
        for _ in range(5):
            assert ask(api, "acme").json()["error"]["code"] == "queue_full"
        api.backend.refusals.clear()
        assert ask(api, "acme").headers["x-ratelimit-remaining-requests"] == "2"


@pytest.mark.parametrize("idempotency_key", ["", "mine"])
def test_who_hangs_up_and_may_join_again_has_paid_for_what_goes_on(idempotency_key: str) -> None:
    with tenants(grace_s=0.05) as api:
        api.backend.script = lambda backend, request: [*speak(backend, request)[:1], Hang()]
        headers = {"authorization": "Bearer slow"} | ({"idempotency-key": idempotency_key} if idempotency_key else {})
        body = {"prompt": [1, 2, 3], "max_tokens": 100, "stream": True}
        with api.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            next(answer.iter_lines())
        while 'outcome="client_disconnected",tenant="slow"} 1.0' not in api.http.get("/metrics").text:
            pass
        api.backend.script = speak
        left = 120 - int(ask(api, "slow", max_tokens=1).headers["x-ratelimit-remaining-output-tokens"])
        assert left >= 50 if idempotency_key else left <= 10


def test_what_goes_on_without_its_client_has_its_place_and_is_paid_for_as_it_ends() -> None:
    with tenants() as api:
        hang = Hang()
        api.backend.script = lambda backend, request: [*speak(backend, request)[:1], hang, *speak(backend, request)[1:]]
        headers = {"authorization": "Bearer single", "idempotency-key": "mine"}
        body = {"prompt": [1, 2, 3], "max_tokens": 100, "stream": True}
        with api.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            next(answer.iter_lines())
        api.backend.script = speak
        for _ in range(3):
            refused = ask(api, "single")
            assert refused.status_code == 429 and "1 requests at once" in refused.json()["error"]["message"]
        hang.release()
        while ask(api, "single", max_tokens=1).status_code == 429:
            pass
        while 'baton_tenant_tokens_total{kind="output",tenant="single"} 101.0' not in api.http.get("/metrics").text:
            pass  # an answer is counted when it has been sent
        assert not api.backend.cancelled


@contextmanager
def again(api: Api, tenant: str, **body: Any) -> Iterator[httpx.Response]:
    """Sends one request, always under the same key, and hangs up in the end."""
    headers = {"authorization": f"Bearer {tenant}", "idempotency-key": "mine"}
    sent = {"prompt": [1, 2, 3], "max_tokens": 100, "stream": True, **body}
    with api.http.stream("POST", "/v1/completions", json=sent, headers=headers) as answer:
        yield answer


def await_gone(api: Api, num_gone: int) -> None:
    """Until so many clients have been seen to leave."""
    gone = f'endpoint="/v1/completions",refusal="client_disconnected",status="499"}} {num_gone}.0'
    while gone not in api.http.get("/metrics").text:
        pass


def halting(backend: Any, hang: Hang) -> None:
    backend.script = lambda each, request: [*speak(each, request)[:1], hang, *speak(each, request)[1:]]


def test_who_comes_back_takes_the_place_over_that_his_request_has_kept() -> None:
    with tenants(kind=KeepingBackend) as api:
        backend, hang = api.backend, Hang()
        assert isinstance(backend, KeepingBackend)
        halting(backend, hang)
        with again(api, "single") as answer:
            next(answer.iter_lines())
        await_gone(api, 1)
        assert ask(api, "single").status_code == 429
        backend.pause = Hang()
        with again(api, "single") as joined:
            assert joined.status_code == 200
            lines = joined.iter_lines()
            next(lines)
            hang.release()
            while 'outcome="client_disconnected",tenant="single"} 1.0' not in api.http.get("/metrics").text:
                pass
            assert ask(api, "single").status_code == 429, "what was given over is not given back a second time"
            backend.pause.release()
            assert "data: [DONE]" in list(lines)
        while 'outcome="joined",tenant="single"} 1.0' not in (metrics := api.http.get("/metrics").text):
            pass
        assert 'baton_tenant_tokens_total{kind="output",tenant="single"} 100.0' in metrics, "paid for once"
        backend.script = speak
        assert ask(api, "single").status_code == 200


def test_of_one_request_only_the_last_client_that_left_is_waited_for() -> None:
    now_s = 1000.0
    with tenants(kind=KeepingBackend, clock=lambda: now_s) as api:
        backend = api.backend
        assert isinstance(backend, KeepingBackend)
        halting(backend, Hang())
        backend.pause = Hang()
        for num_gone in (1, 2):
            with again(api, "once") as answer:
                assert answer.status_code == 200
                next(answer.iter_lines())
            await_gone(api, num_gone)
        while not backend.cancelled:
            api.http.get("/metrics")
        assert backend.cancelled == [backend.requests[0].request_id]
        with again(api, "once") as refused:
            assert refused.status_code == 429 and b"2 requests a minute" in refused.read()
        now_s += 60
        refused_now = ask(api, "once")
        assert "1 requests at once" in refused_now.json()["error"]["message"], "who was refused took no place"
        backend.pause.release()
        headers = {"authorization": "Bearer once"}
        assert api.http.get("/v1/requests/mine/stream", headers=headers).text.endswith("[DONE]\n\n")


def test_what_failed_behind_a_client_that_left_has_not_run_to_its_end() -> None:
    with tenants() as api:
        hang = Hang()
        api.backend.script = lambda backend, request: [
            *speak(backend, request)[:2], hang, end_output(request.request_id, Refusal.WORKERS_DIED, "w-0")
        ]  # fmt: skip
        with again(api, "slow") as answer:
            next(answer.iter_lines())
        await_gone(api, 1)
        hang.release()
        while 'outcome="client_disconnected",tenant="slow"} 1.0' not in api.http.get("/metrics").text:
            pass
        api.backend.script = speak
        left = 120 - int(ask(api, "slow", max_tokens=1).headers["x-ratelimit-remaining-output-tokens"])
        assert left >= 50, "as where it goes on elsewhere: what was expected stays paid"


def test_keys_that_ended_models_and_priorities_are_told_apart() -> None:
    with tenants() as api:
        for name, code, what in (
            ("old", "key_expired", "1971-01-01"),
            ("stolen", "key_revoked", "1971-01-02"),
            ("nobody", "invalid_api_key", "valid key"),
        ):
            response = ask(api, name)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (401, code) and what in error["message"]
        denied = ask(api, "small")
        assert (denied.status_code, denied.json()["error"]["code"]) == (403, "model_not_allowed")
        for name, count in (("small", 0), ("polite", 1)):
            headers = {"authorization": f"Bearer {name}"}
            assert len(api.http.get("/v1/models", headers=headers).json()["data"]) == count
            card = api.http.get(f"/v1/models/{MODEL.name}", headers=headers)
            assert card.status_code == (200 if count else 404)
        assert ask(api, "polite", priority=11).json()["error"]["param"] == "priority"
        for asked, given in ((None, 0), (10, 10), (0, 0)):
            assert ask(api, "polite", priority=asked).status_code == 200
            assert api.backend.requests[-1].priority == given
        assert api.backend.wishes[-1].tenant == "polite" and api.backend.wishes[-1].weight == 3.0
        assert ask(api, "plain").status_code == 200 and api.backend.wishes[-1].tenant == "default"
        assert api.http.get("/admin/keys", headers={"authorization": "Bearer acme"}).status_code == 403


def test_prompts_of_tenants_and_their_own_salts_are_named_apart() -> None:
    with tenants() as api:
        salts = []
        for name, salt in (("stranger", None), ("polite", None), ("polite", "a"), ("polite", "b"), ("stranger", "a")):
            assert ask(api, name, **({"cache_salt": salt} if salt else {})).status_code == 200
            salts.append(api.backend.requests[-1].cache_salt)
        assert len({*salts, 0}) == 6
        assert ask(api, "polite", cache_salt="").json()["error"]["param"] == "cache_salt"
        sessions = []
        for name in ("stranger", "polite"):
            ask(api, name, session_id="1")
            sessions.append(api.backend.wishes[-1].session)
        assert len({*sessions, 0}) == 3
    with tenants(shared_prefixes=True) as api:
        assert ask(api, "polite").status_code == 200 and api.backend.requests[-1].cache_salt == 0
    with open_api() as api:  # no tenants
        ask(api, "any")
        assert api.backend.requests[-1].cache_salt == 0
        ask(api, "any", cache_salt="x")
        assert api.backend.requests[-1].cache_salt != 0


def test_a_deadline_may_stand_in_the_body_or_a_header_and_the_shorter_counts(api: Api) -> None:
    for body, header, expected in ((5, None, 5.0), (None, "2.5", 2.5), (5, "2", 2.0), (None, None, 0.0)):
        headers = {"x-request-timeout": header} if header else {}
        sent = {"prompt": [1], "max_tokens": 1, **({"timeout": body} if body else {})}
        assert api.http.post("/v1/completions", json=sent, headers=headers).status_code == 200
        assert api.backend.wishes[-1].timeout_s == expected
    for bad in ("0", "-1", "nan", "soon", "1e9"):
        refused = api.http.post("/v1/completions", json={"prompt": [1]}, headers={"x-request-timeout": bad})
        assert refused.json()["error"]["param"] == "timeout"
    anthropic = {"messages": MESSAGES, "max_tokens": 1, "model": MODEL.name}
    assert api.http.post("/v1/messages", json=anthropic, headers={"x-request-timeout": "7"}).status_code == 200
    assert api.backend.wishes[-1].timeout_s == 7.0


# ---- what is written down ----


def test_usage_is_counted_and_logged_without_a_word_of_the_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "usage"
    with tenants(folder, metric_labels=1) as api:
        api.backend.cached_tokens = 2
        answer = api.client.completions.create(model=MODEL.name, prompt="a secret word", max_tokens=5, n=2)
        assert ask(api, "polite", max_tokens=3, stream=True).status_code == 200
        assert ask(api, "stranger").status_code == 200
        last_word = 'outcome="ok",tenant="other"} 2.0'
        while last_word not in (metrics := api.http.get("/metrics").text):
            pass  # an account is closed when the answer has gone
    assert 'baton_tenant_requests_total{outcome="ok",tenant="acme"} 1.0' in metrics
    assert 'baton_tenant_requests_total{outcome="ok",tenant="other"} 2.0' in metrics, "labels are bounded"
    assert 'baton_tenant_tokens_total{kind="output",tenant="acme"} 10.0' in metrics
    (file,) = folder.iterdir()
    text = file.read_text()
    assert "secret" not in text and stat.S_IMODE(file.stat().st_mode) == 0o600
    found = {usage.tenant: usage for usage in read_usage(folder, time.time() - 60)}
    acme = found["acme"]
    assert answer.usage is not None and acme.prompt_tokens == answer.usage.prompt_tokens
    assert (acme.completion_tokens, acme.cached_tokens, acme.outcome, acme.key_id) == (10, 2, "ok", "acme")
    assert acme.ttft_s is not None and acme.ttft_s <= acme.total_s
    assert list(acme.decode_workers) == ["decode-0"] and list(acme.prefill_workers) == ["prefill-0"]
    assert list(read_usage(folder, time.time() + 60)) == []
    assert main(["usage", "--folder", str(folder), "--since", "1h", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["acme"] == {
        "requests": 1, "failed": 0, "prompt_tokens": acme.prompt_tokens, "cached_tokens": 2, "completion_tokens": 10
    }  # fmt: skip
    assert main(["usage", "--folder", str(folder), "--by", "model"]) == 0
    assert MODEL.name in capsys.readouterr().out


def usage(number: int) -> Usage:
    return Usage(time.time(), f"r{number}", "t", "k", "/v1/completions", "m", "ok", 1, 0, 1, None, 0.1)


def test_the_usage_log_is_bounded_and_outlives_a_disk_that_does_not_take_it(tmp_path: Path) -> None:
    folder = tmp_path / "usage"
    log = UsageLog(UsageConfig(str(folder), max_bytes=1 << 16, max_files=3), "router-0")
    for number in range(2000):
        log.write(usage(number))
    log.close()
    assert len(list(folder.iterdir())) == 3 and sum(file.stat().st_size for file in folder.iterdir()) < 3 << 16
    kept = [int(each.request_id[1:]) for each in read_usage(folder, 0.0)]
    assert kept == list(range(2000 - len(kept), 2000)) and len(kept) > 300
    with (folder / "usage-router-0.jsonl").open("a") as file:
        file.write('{"half a li')
    assert len(list(read_usage(folder, 0.0))) == len(kept)

    one = UsageLog(UsageConfig(str(tmp_path / "one"), max_bytes=1 << 16, max_files=1), "router-0")
    for number in range(1000):
        one.write(usage(number))
    one.close()
    (only,) = (tmp_path / "one").iterdir()
    assert only.stat().st_size <= 1 << 16 and list(read_usage(tmp_path / "one", 0.0))[-1].request_id == "r999"

    (tmp_path / "full").mkdir()
    os.symlink("/dev/full", tmp_path / "full" / "usage-router-0.jsonl")
    full = UsageLog(UsageConfig(str(tmp_path / "full")), "router-0")
    for number in range(100):
        full.write(usage(number))
    full.close()
    assert full.num_lost > 0
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match="cannot be made or written"):
        UsageLog(UsageConfig(str(tmp_path / "file" / "usage")), "router-0")


# ---- the file of tenants ----


def test_a_file_names_tenants_and_their_keys(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"k2").hexdigest()
    path = tmp_path / "tenants.yaml"
    path.write_text(
        "tenants:\n  acme:\n    requests_per_min: 60\n    weight: 2\n    keys:\n      - key: k1\n"
        f"      - {{key: 'sha256:{digest}', expires: 2027-01-01T00:00:00Z}}\n  empty:\n"
    )
    found = read_tenants(path, 10)
    assert found.tenants["acme"].requests_per_min == 60 and found.tenants["empty"].weight == 1.0
    assert [(each.tenant, each.expires_s) for each in found.keys] == [("acme", 0.0), ("acme", 1798761600.0)]
    assert found.keys[1].digest.hex() == digest and "'k1'" not in repr(found)
    for text, what in (
        ("tenants: {a: {requests_per_minute: 1}}", "did you mean tenants.a.requests_per_min"),
        ("tenants: {'a b': {}}", "the name of a tenant"),
        ("tenants: {a: {weight: 0}}", "tenants.a.weight must be above 0"),
        ("tenants: {a: {keys: [{key: x}]}, b: {keys: [{key: x}]}}", "is also a key of a"),
        ("tenant: {}", "must hold `tenants:`"),
        ("tenants: {a: {min_priority: 2, max_priority: 1}}", "min_priority 2"),
        ("tenants: {a: {}, b: {}, c: {}}", "max_tenants allows 2"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidConfig, match=what):
            read_tenants(path, 2)
    path.write_text("tenants: {a: {keys: [{key: [s3cret]}]}}")
    with pytest.raises(InvalidConfig) as wrong:
        read_tenants(path, 2)
    assert "s3cret" not in str(wrong.value)


def test_tenants_are_reason_enough_to_listen_on_any_address() -> None:
    settings = {"model": "m", "host": "0.0.0.0"}
    with pytest.raises(InvalidConfig, match="no API keys"):
        build(RouterConfig, settings)
    assert build(RouterConfig, {**settings, "tenants": {"file": "tenants.yaml"}}).tenants.is_on
