"""/v1/messages as the anthropic client sees it, before a fake that says what a script wants or draws what a grammar allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from fake_backend import Api, open_api
from test_api_tools import ANSWER, CALLS, says

from router.config import ApiConfig
from workers.request import FinishReason

CITY = {"type": "object", "properties": {"city": {"enum": ["Berlin", "Paris"]}}, "required": ["city"], "additionalProperties": False}  # fmt: skip
TOOLS: list[Any] = [{"name": "weather", "description": "The weather of a city.", "input_schema": CITY}]
ASK: list[Any] = [{"role": "user", "content": "How is the weather in Berlin?"}]


@pytest.fixture(scope="module")
def shared(thinking_folder: Path) -> Iterator[tuple[Api, anthropic.Anthropic]]:
    config = ApiConfig(api_keys=("key-of-this-test-000",))
    with (
        open_api(config, key="key-of-this-test-000", checkpoint=thinking_folder) as api,
        anthropic.Anthropic(base_url=api.url, api_key="key-of-this-test-000", max_retries=0, timeout=30) as client,
    ):
        yield api, client


@pytest.fixture
def api(shared: tuple[Api, anthropic.Anthropic]) -> Api:
    shared[0].backend.reset()
    return shared[0]


@pytest.fixture
def client(shared: tuple[Api, anthropic.Anthropic]) -> anthropic.Anthropic:
    return shared[1]


def ask(client: anthropic.Anthropic, **fields: Any) -> Any:
    return client.messages.create(model="ernie-tiny", messages=ASK, **{"max_tokens": 200, **fields})


def test_an_answer_comes_as_blocks_with_its_reasoning_and_usage(api: Api, client: anthropic.Anthropic) -> None:
    api.backend.script, api.backend.cached_tokens = says(ANSWER), 8
    message = ask(client, system="Be brief.", metadata={"user_id": "u"})
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert (message.content[0].thinking, message.content[1].text) == ("I know it.", "It is a <nice> day.")
    assert (message.stop_reason, message.role, message.type) == ("end_turn", "assistant", "message")
    num_prompt = len(api.backend.requests[-1].prompt_token_ids)
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (num_prompt - 8, 8)
    assert message.usage.output_tokens == len(api.backend.tokenizer.encode(ANSWER))
    assert "system: Be brief." in api.backend.tokenizer.decode(api.backend.requests[-1].prompt_token_ids)


@pytest.mark.parametrize("said", [ANSWER, CALLS])
def test_a_stream_adds_up_to_the_whole_message(api: Api, client: anthropic.Anthropic, said: str) -> None:
    api.backend.script = says(said)
    whole = ask(client, tools=TOOLS)
    with client.messages.stream(model="ernie-tiny", messages=ASK, max_tokens=200, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    different = {"id": streamed.id}
    different |= {
        "content": [b.model_copy(update={"id": None}) if b.type == "tool_use" else b for b in streamed.content]
    }
    expected = [b.model_copy(update={"id": None}) if b.type == "tool_use" else b for b in whole.content]
    assert [b.model_dump() for b in different["content"]] == [b.model_dump() for b in expected]
    assert (streamed.stop_reason, streamed.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(whole.content)


def test_tools_are_called_and_their_results_read(api: Api, client: anthropic.Anthropic) -> None:
    api.backend.script = says(CALLS)
    called = ask(client, tools=TOOLS)
    (use,) = [block for block in called.content if block.type == "tool_use"]
    assert called.stop_reason == "tool_use" and (use.name, use.input) == ("weather", {"city": "Berlin"})
    history = [
        *ASK,
        {"role": "assistant", "content": called.content},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    api.backend.script = says(ANSWER)
    client.messages.create(model="ernie-tiny", messages=history, max_tokens=200, tools=TOOLS)
    prompt = api.backend.tokenizer.decode(api.backend.requests[-1].prompt_token_ids)
    assert "assistant: (He asks.)<tool_call>weather Berlin</tool_call>tool: rainuser: Well?" in prompt


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_call_can_be_enforced(api: Api, client: anthropic.Anthropic, choice: dict[str, Any]) -> None:
    message = ask(
        client, tools=TOOLS, tool_choice={**choice, "disable_parallel_tool_use": True}, thinking={"type": "disabled"}
    )
    (use,) = message.content
    assert use.type == "tool_use" and use.input["city"] in ("Berlin", "Paris") and message.stop_reason == "tool_use"


def test_ends_are_told_apart(api: Api, client: anthropic.Anthropic) -> None:
    api.backend.script = says("so it", FinishReason.LENGTH)
    assert ask(client, max_tokens=1).stop_reason == "max_tokens"

    def stopped(backend: Any, request: Any) -> list[Any]:
        outputs: list[Any] = says("so</think>it")(backend, request)
        return [*outputs[:-1], outputs[-1]._replace(stop_reason="END")]

    api.backend.script = stopped
    message = ask(client, stop_sequences=["END"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")
    assert api.backend.requests[-1].params.stop == ("END",)


def test_thinking_has_its_budget_and_tokens_are_counted(api: Api, client: anthropic.Anthropic) -> None:
    api.backend.script = says(ANSWER)
    ask(client, max_tokens=300, thinking={"type": "enabled", "budget_tokens": 40})
    request = api.backend.requests[-1]
    assert request.params.thinking is not None and request.params.thinking.num_tokens == 40
    counted = client.messages.count_tokens(
        model="ernie-tiny", messages=ASK, thinking={"type": "enabled", "budget_tokens": 40}
    )
    assert counted.input_tokens == len(request.prompt_token_ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image' is not supported"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role must be user"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, r"tools\[0\] must have a name and an input_schema"),
        ({"tool_choice": {"type": "must"}}, "tool_choice must be"),
        ({"output_format": {"type": "xml"}}, "output_format must be"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_anthropics_form(api: Api, fields: dict[str, Any], message: str) -> None:
    response = api.http.post("/v1/messages", json={"messages": ASK, "max_tokens": 5, **fields})
    error = response.json()
    assert (
        response.status_code == 400 and error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    )
    import re

    assert re.search(message, error["error"]["message"]) and not api.backend.requests


def test_a_wrong_key_and_a_stream_that_breaks_are_told_in_anthropics_form(api: Api) -> None:
    wrong = anthropic.Anthropic(base_url=api.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        ask(wrong)
    api.backend.script = lambda backend, request: [*says("so it is")(backend, request)[:2], RuntimeError("broken")]
    body = {"messages": ASK, "max_tokens": 5, "stream": True}
    text = api.http.post("/v1/messages", json=body).text
    assert "event: message_start" in text and text.rstrip().splitlines()[-2] == "event: error" and "[DONE]" not in text
