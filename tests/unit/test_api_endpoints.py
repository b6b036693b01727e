"""The endpoints beside generation, who may call them, and what the metrics and the trace tell."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from fake_backend import MESSAGES, MODEL, Api, open_api
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from cluster.settings import build
from router.config import ApiConfig
from workers.errors import InvalidConfig, Refusal, Refused
from workers.status import Role


def metrics(api: Api) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(api.http.get("/metrics").text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value for each in families for sample in each.samples
    }


def examples(api: Api) -> dict[str, set[str]]:
    """Traces by the name of a histogram whose buckets have them as examples."""
    answer = api.http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    found: dict[str, set[str]] = {}
    for family in open_metrics(answer.text):
        for sample in family.samples:
            if sample.exemplar is not None:
                assert set(sample.exemplar.labels) == {"trace_id"} and sample.exemplar.value <= float(
                    sample.labels["le"]
                )
                found.setdefault(family.name, set()).add(sample.exemplar.labels["trace_id"])
    return found


def test_a_monitor_that_reads_open_metrics_gets_the_same_names() -> None:
    with open_api(ApiConfig(metrics_compat="vllm")) as api:
        assert api.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}).status_code == 200
        plain, opened = (
            {
                sample.name
                for family in read(api.http.get("/metrics", headers={"accept": kind}).text)
                for sample in family.samples
            }
            for read, kind in (
                (text_string_to_metric_families, "text/plain"),
                (open_metrics, "application/openmetrics-text; version=1.0.0"),
            )
        )
    assert {name for name in opened if not name.endswith("_created")} == {
        name for name in plain if not name.endswith("_created")
    }
    assert "vllm:time_to_first_token_seconds_bucket" in opened


def test_buckets_of_latencies_have_sampled_traces_as_examples_where_the_monitor_reads_open_metrics() -> None:
    timed = ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds")
    with open_api(ApiConfig(metrics_compat="vllm")) as api:
        body = {"model": "ernie-tiny", "prompt": "a", "max_tokens": 3}
        for traceparent in ("", f"00-{'a' * 32}-{'1' * 16}-00", "nonsense"):
            answer = api.http.post("/v1/completions", json=body, headers={"traceparent": traceparent})
            assert answer.status_code == 200
        assert examples(api) == {}, "nobody keeps a trace that is not sampled"
        for stream in (False, True):
            trace_id = ("b" if stream else "c") * 32
            answer = api.http.post(
                "/v1/completions",
                json={**body, "stream": stream},
                headers={"traceparent": f"00-{trace_id}-{'1' * 16}-01"},
            )
            assert answer.status_code == 200
            found = examples(api)
            assert set(found) == {
                *(f"baton_{name}" for name in timed),
                *(f"vllm:{name}" for name in (*timed, "time_per_output_token_seconds")),
            }
            assert all(trace_id in traces for traces in found.values())
        plain = api.http.get("/metrics")
        assert plain.headers["content-type"].startswith("text/plain") and "trace_id" not in plain.text


def test_the_served_model_is_listed_with_the_length_of_its_context(api: Api) -> None:
    (model,) = api.client.models.list().data
    assert model.id == MODEL.name and model.max_model_len == MODEL.max_model_len
    assert api.client.models.retrieve(MODEL.name) == model
    with pytest.raises(openai.NotFoundError):
        api.client.models.retrieve("other/model")


def test_no_model_is_listed_before_a_worker_has_reported(api: Api) -> None:
    api.backend.model = None
    assert api.client.models.list().data == []


def test_alive_does_not_mean_ready(api: Api) -> None:
    api.backend.ready = False
    assert api.http.get("/health").status_code == 200
    response = api.http.get("/ready")
    assert response.status_code == 503 and response.json()["error"]["code"] == "no_workers"
    api.backend.ready = True
    assert api.http.get("/ready").status_code == 200


def test_the_version_is_told(api: Api) -> None:
    assert api.http.get("/version").json()["version"]


def test_tokenize_and_detokenize_are_each_others_inverse(api: Api) -> None:
    answer = api.http.post("/tokenize", json={"prompt": "a day é", "return_token_strs": True}).json()
    assert answer["tokens"] == api.backend.tokenizer.encode("a day é")
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == MODEL.max_model_len
    assert api.http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "a day é"}


def test_tokenize_renders_conversations(api: Api) -> None:
    answer = api.http.post("/tokenize", json={"messages": MESSAGES}).json()
    tokenizer = api.backend.tokenizer
    assert answer["tokens"] == tokenizer.encode(tokenizer.render_chat(MESSAGES))


def test_tokenize_wants_either_a_prompt_or_messages_and_detokenize_known_ids(api: Api) -> None:
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [MODEL.vocab_size]}),
        ("/detokenize", {"tokens": "x"}),
    ):
        assert api.http.post(path, json=body).status_code == 400


def test_an_operator_sees_the_routers_whole_state(api: Api) -> None:
    status = api.http.get("/admin/status").json()
    assert status["router_id"] == "router-0" and status["num_waiting"] == 2 and status["counters"] == {"retries": 4}
    worker = status["workers"][0]
    assert worker["connected"] is True and worker["status"]["role"] == "prefill"
    assert worker["status"]["generation"] == str((1_795_974_964 << 32) + 1)  # a number of JavaScript would lose its end
    assert worker["status"]["load"]["num_free_blocks"] == 7 and worker["status"]["counters"] == {"preemptions": 3}


def test_an_operator_switches_a_role_and_gets_the_worker_as_it_is_then(api: Api) -> None:
    response = api.http.post("/admin/workers/prefill-0/role", json={"role": "mixed"})
    assert response.status_code == 200 and response.json()["role"] == "mixed"
    assert api.backend.roles["prefill-0"] is Role.MIXED


def test_a_switch_that_leaves_nobody_to_decode_is_400_unless_forced(api: Api) -> None:
    path = "/admin/workers/decode-0/role"
    assert api.http.post(path, json={"role": "prefill"}).status_code == 400
    assert api.backend.roles["decode-0"] is Role.DECODE
    assert api.http.post(path, json={"role": "prefill", "force": True}).status_code == 200


def test_an_operator_drains_a_worker_and_undoes_it(api: Api) -> None:
    path = "/admin/workers/prefill-0/drain"
    try:
        assert api.http.post(path, json={}).json()["is_draining"] is True
        refused = api.http.post("/admin/workers/decode-0/drain", json={"drain": True})
        assert refused.status_code == 400 and "no worker could decode" in refused.json()["error"]["message"]
        assert api.http.post("/admin/workers/decode-0/drain", json={"force": True}).status_code == 200
    finally:
        api.backend.drained.clear()
    assert api.http.post(path, json={"drain": False}).json()["is_draining"] is False
    assert api.http.post("/admin/workers/nobody/drain", json={}).status_code == 404


def test_a_switch_of_an_unknown_worker_is_404_and_to_an_unknown_role_400(api: Api) -> None:
    assert api.http.post("/admin/workers/nobody/role", json={"role": "mixed"}).status_code == 404
    response = api.http.post("/admin/workers/decode-0/role", json={"role": "boss"})
    assert response.status_code == 400 and response.json()["error"]["param"] == "role"


def test_an_operator_pins_a_worker_and_reads_what_decides_on_roles(api: Api) -> None:
    path = "/admin/workers/prefill-0"
    assert api.http.post(f"{path}/pin", json={}).json() == {"worker_id": "prefill-0", "pinned": True}
    assert api.backend.pinned == {"prefill-0"}
    assert api.http.post(f"{path}/role", json={"role": "prefill", "pin": False}).status_code == 200
    assert not api.backend.pinned
    assert api.http.post("/admin/workers/nobody/pin", json={}).status_code == 404
    assert api.http.get("/admin/roles").json()["leader"] == "router-0"
    told = metrics(api)
    labels = {"from": "decode", "to": "prefill", "reason": "controller", "outcome": "done"}
    assert told["baton_role_switches_total", frozenset(labels.items())] == 2
    assert told["baton_desired_workers", frozenset()] == 5 and told["baton_roles_leader", frozenset()] == 1
    assert told["baton_role_gain_requests_per_second", frozenset({("kind", "measured")})] == 1.25
    assert told["baton_role_switch_phase_seconds", frozenset({("phase", "fencing"), ("quantile", "0.99")})] == 0.009


def test_metrics_count_requests_by_status_and_reason(api: Api) -> None:
    def count(status: str, refusal: str) -> float:
        labels = {"endpoint": "/v1/completions", "status": status, "refusal": refusal}
        return metrics(api).get(("baton_requests_total", frozenset(labels.items())), 0.0)

    before = count("200", ""), count("429", "queue_full"), count("400", "invalid_request")
    api.http.post("/v1/completions", json={"prompt": "Hi"})
    api.http.post("/v1/completions", json={"prompt": "Hi", "stream": True})
    api.backend.refusals = {2: Refused(Refusal.QUEUE_FULL, "full")}
    api.http.post("/v1/completions", json={"prompt": "Hi"})
    api.http.post("/v1/completions", json={"prompt": []})
    after = count("200", ""), count("429", "queue_full"), count("400", "invalid_request")
    assert [new - old for new, old in zip(after, before, strict=True)] == [2, 1, 1]


def test_metrics_tell_tokens_latencies_and_handoffs() -> None:
    with open_api() as api:
        api.backend.cached_tokens = 1
        api.client.completions.create(model=MODEL.name, prompt="a day", n=2, max_tokens=5)
        told = {name: value for (name, labels), value in metrics(api).items() if not labels}
        assert told["baton_prompt_tokens_total"] == 2 and told["baton_cached_prompt_tokens_total"] == 1
        assert told["baton_generation_tokens_total"] == 10 and told["baton_num_requests_running"] == 0
        assert told["baton_time_to_first_token_seconds_count"] == 2
        assert told["baton_inter_token_latency_seconds_count"] == 8
        assert told["baton_e2e_request_latency_seconds_count"] == 1
        assert told["baton_num_requests_waiting"] == 2 and told["baton_router_retries_total"] == 4
        shm = frozenset({("transport", "shm")})
        assert metrics(api)["baton_kv_handoff_bytes_total", shm] == 8192
        assert metrics(api)["baton_kv_handoff_seconds_sum", shm] == 0.5
        decode = frozenset({("worker_id", "decode-0")})
        assert metrics(api)["baton_worker_num_free_blocks", decode] == 7
        assert metrics(api)["baton_worker_preemptions_total", decode] == 3


def test_what_a_router_has_learnt_of_times_is_told(api: Api) -> None:
    told = metrics(api)
    assert told["baton_worker_speed_ratio", frozenset({("worker_id", "decode-0")})] == 1.5
    for kind in ("0:m/1x", "1:m/1x"):
        assert told["baton_forecast_seconds", frozenset({("kind", kind), ("work", "prompt")})] == 2e-5
    assert told["baton_forecast_seconds", frozenset({("kind", "all"), ("work", "handoff")})] == 0.002
    status = api.http.get("/admin/status").json()
    assert status["workers"][0]["speed"] == 1.5
    assert status["forecast"]["kinds"][0] == {
        "name": "m/1x", "num_samples": 7, "seconds": {"step": 0.004, "prompt": 2e-5}
    }  # fmt: skip


def test_unknown_paths_do_not_become_metric_labels(api: Api) -> None:
    api.http.get("/made/up")
    endpoints = {dict(labels).get("endpoint") for _, labels in metrics(api)}
    assert "other" in endpoints and "/made/up" not in endpoints


def test_a_trace_tells_where_each_choice_ran_and_how_long_it_took(api: Api) -> None:
    ask: dict[str, Any] = {"model": MODEL.name, "messages": MESSAGES, "max_tokens": 8, "extra_body": {"trace": True}}
    trace = api.client.chat.completions.create(n=2, **ask).baton
    assert trace["choices"][1].pop("routing")["reason"] == "least_cost"
    assert trace["choices"][1] == {
        "index": 1,
        "prefill_worker": "prefill-0",
        "decode_worker": "decode-0",
        "transport": "shm",
        "kv_bytes": 4096,
        "transfer_s": 0.25,
        "prefill_s": 0.5,
        "attempts": 1,
        "queue_s": 0.0,
        "wait_s": 0.0,
        "exposed_s": 0.0,
        "resends": 0,
        "degradations": 0,
        "recovery": "",
        "cached_tokens": 0,
    }
    assert 0 < trace["ttft_s"] <= trace["total_s"] and trace["tpot_s"] >= 0
    chunks = list(api.client.chat.completions.create(stream=True, **ask))
    assert chunks[-1].baton["choices"][0]["decode_worker"] == "decode-0" and chunks[-1].choices[0].finish_reason
    assert not any(hasattr(chunk, "baton") for chunk in chunks[:-1])
    chunks = list(api.client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask))
    assert chunks[-1].baton and chunks[-1].choices == [] and not hasattr(chunks[-2], "baton")


def test_without_being_asked_no_trace_is_told(api: Api) -> None:
    assert not hasattr(api.client.chat.completions.create(model=MODEL.name, messages=MESSAGES), "baton")


def test_settings_that_cannot_work_are_refused_by_name() -> None:
    for name, value in (("max_n", 0), ("heartbeat_s", 0.0), ("api_keys", ("",)), ("max_body_bytes", 1)):
        with pytest.raises(InvalidConfig, match=name):
            build(ApiConfig, {name: value})
