"""Fields of chats that say what the prompt is: references of a search, token ids, a template of the client's; and vLLM's metric names."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fake_backend import MESSAGES, Api, error_of, open_api

from router.config import ApiConfig

API_CONFIG = ApiConfig(allow_chat_template=True, metrics_compat="vllm")
DATE = "2026-11-30 04:00:00, Monday, Beijing/China"


def ask(api: Api, messages: list[Any] = MESSAGES, **fields: Any) -> Any:
    return api.client.chat.completions.create(model="ernie-tiny", messages=messages, max_tokens=3, extra_body=fields)


def prompt_of(api: Api) -> str:
    return api.backend.tokenizer.decode(api.backend.requests[-1].prompt_token_ids)


@pytest.mark.parametrize(
    ("question", "heading", "closing"),
    [
        ("Who?", "#References", "complete the conversation:\nWho?"),
        ("周杰伦是谁？", "#参考文章", "补全对话\n周杰伦是谁？"),
    ],
)
def test_references_stand_before_the_question_in_its_language(question: str, heading: str, closing: str) -> None:
    """The prompt is longer than the fake model's context, so it is looked at where it is tokenized."""
    references = [{"title": "周杰伦", "content": "歌手 {question}", "site": "百度百科"}, "plain {date}"]
    body = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    with open_api(API_CONFIG) as api:
        assert api.backend.model is not None
        object.__setattr__(api.backend.model, "max_model_len", 8192)
        ask(api, body, web_search={"references": references, "date": DATE})
        said = prompt_of(api)
        assert (
            f"\n{DATE}\n\n{heading}\n##参考文章1\n标题：周杰伦\n内容：歌手 {{question}}\n来源网站的网站名：百度百科\n\n##参考文章2\nplain {{date}}\n"
            in said
        )
        assert closing in said and "Be brief." in said
        ask(api, body, web_search={"references": "as they are", "date": DATE, "language": "en"})
        assert "#References\nas they are\n" in prompt_of(api)


@pytest.mark.parametrize(
    ("search", "why"),
    [
        ({"references": "x"}, "date"),
        ({"references": [], "date": DATE}, "references"),
        ({"references": [{"x": "y"}], "date": DATE}, r"references\[0\]"),
        ({"references": [{"title": 5}], "date": DATE}, "texts"),
        ({"references": "x", "date": DATE, "language": "fr"}, "language"),
        ({"references": "x", "date": DATE, "engine": "y"}, "engine"),
    ],
)
def test_a_search_that_cannot_be_shown_is_400(api: Api, search: dict[str, Any], why: str) -> None:
    response = api.http.post("/v1/chat/completions", json={"messages": MESSAGES, "web_search": search})
    error = error_of(response)
    assert response.status_code == 400 and error["param"] == "web_search" and re.search(why, error["message"])


def test_a_prompt_of_token_ids_stands_for_the_whole_conversation(api: Api) -> None:
    answer = ask(api, [], prompt_token_ids=[5, 300, 301])
    assert api.backend.requests[-1].prompt_token_ids == (5, 300, 301) and answer.usage.prompt_tokens == 3
    for fields, param in (
        ({"prompt_token_ids": [5], "messages": MESSAGES}, "prompt_token_ids"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids"),
        ({"prompt_token_ids": [5] * 600}, "prompt_token_ids"),
        ({"messages": []}, "messages"),
    ):
        response = api.http.post("/v1/chat/completions", json=fields)
        assert response.status_code == 400 and error_of(response)["param"] == param


def test_a_template_of_the_clients_is_rendered_where_it_is_allowed_and_within_the_sandbox(api: Api) -> None:
    ask(api, chat_template="{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}")
    assert prompt_of(api) == "[user|Hi]"
    assert prompt_of(api) != (ask(api), prompt_of(api))[1], "the next request has the model's own again"
    for template in (
        "{% if %}",
        "{{ ''.__class__.__mro__ }}",
        "{% for a in range(9999999) %}x{% endfor %}",
        "x" * 70_000,
    ):
        response = api.http.post("/v1/chat/completions", json={"messages": MESSAGES, "chat_template": template})
        assert response.status_code == 400, template[:40]
    with open_api() as closed:
        response = closed.http.post("/v1/chat/completions", json={"messages": MESSAGES, "chat_template": "x"})
        assert response.status_code == 400 and "not allowed here" in error_of(response)["message"]


def test_the_numbers_have_vllms_names_when_asked(api: Api) -> None:
    ask(api)
    text = api.http.get("/metrics").text
    labels = 'engine="0",model_name="ernie-tiny"'
    value = dict(re.findall(r"^(\S+) (\S+)$", text, re.M))
    for name in (
        "prompt_tokens_total",
        "generation_tokens_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
    ):
        own = {
            "prefix_cache_queries_total": "prompt_tokens_total",
            "prefix_cache_hits_total": "cached_prompt_tokens_total",
        }
        assert value[f"vllm:{name}{{{labels}}}"] == value[f"baton_{own.get(name, name)}"]
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert value[f"vllm:{name}_count{{{labels}}}"] == value[f"baton_{name}_count"]
        assert f"vllm:{name}_bucket" in text
    assert (
        value[f"vllm:num_requests_running{{{labels}}}"] == "1.0"
        and value[f"vllm:num_requests_waiting{{{labels}}}"] == "2.0"
    )
    assert float(value[f"vllm:kv_cache_usage_perc{{{labels}}}"]) == pytest.approx(1 - 7 / 9)
    assert value[f"vllm:num_preemptions_total{{{labels}}}"] == "6.0"
    assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="ernie-tiny"}' in text
    with open_api() as plain:
        assert "vllm:" not in plain.http.get("/metrics").text


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "assistant", "content": None}, "Assistant: "),
        ({"role": "assistant"}, "Assistant: "),
        ({"role": "user"}, "User: "),
        ({"role": "user", "content": ["Hi", {"type": "input_text", "text": "you"}]}, "User: Hi\nyou"),
        ({"role": "assistant", "content": [{"type": "output_text", "text": "Yes"}]}, "Assistant: Yes"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]}, "Assistant: No"),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm"}, {"type": "text", "text": "Yes"}]},
            "Assistant: Yes",
        ),
    ],
)
def test_histories_as_clients_send_them_are_read(api: Api, message: dict[str, Any], text: str) -> None:
    ask(api, [{"role": "user", "content": "a"}, message, {"role": "user", "content": "b"}])
    end = "<|end_of_sentence|>" if message["role"] == "assistant" else "\n"
    assert f"User: a\n{text}{end}User: b\n" in prompt_of(api)


def test_what_was_not_asked_for_is_null_in_a_whole_answer(api: Api) -> None:
    chat = ask(api)
    text = api.client.completions.create(model="ernie-tiny", prompt="Hi", max_tokens=2)
    for answer in (chat, text):
        assert answer.system_fingerprint is None and answer.service_tier is None
        assert answer.choices[0].token_ids is None
    for prompted in (chat, text.choices[0]):
        assert prompted.prompt_logprobs is None and prompted.prompt_token_ids is None
