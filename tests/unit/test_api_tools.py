"""Tools, calls and reasoning over HTTP, as the openai client sees them, with models that write them in ERNIE's formats."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_backend import Api, FakeBackend, Script, error_of, open_api, say

from router.config import ApiConfig
from workers.request import FinishReason
from workers.text.tokenizer import Tokenizer

API_THINKS = True
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
ASK: list[Any] = [{"role": "user", "content": "How is the weather in Berlin?"}]
CALLS = 'He asks.\n</think>\n\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Berlin"}}\n</tool_call>\n'
ANSWER = "I know it.\n</think>\n\n\n<response>\nIt is a <nice> day.\n</response>\n"


def says(text: str, reason: FinishReason = FinishReason.STOP) -> Script:
    def script(backend: FakeBackend, request: Any) -> list[Any]:
        outputs: list[Any] = say(backend, request, backend.tokenizer.encode(text))
        return [*outputs[:-1], outputs[-1]._replace(finish_reason=reason)]

    return script


def ask(api: Api, **fields: Any) -> Any:
    return api.client.chat.completions.create(model="ernie-tiny", messages=ASK, **fields)


def joined(stream: Any) -> tuple[dict[str, Any], str | None]:
    """What the deltas of a stream's one choice come to, and how it ended."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    reason = None
    for chunk in stream:
        for choice in chunk.choices:
            delta = choice.delta
            message["content"] += delta.content or ""
            thought = getattr(delta, "reasoning_content", None)
            message["reasoning"] += thought or ""
            assert getattr(delta, "reasoning", None) == thought
            for call in delta.tool_calls or []:
                if call.id:
                    assert call.index == len(message["calls"]) and call.type == "function"
                    message["calls"].append([call.id, call.function.name, ""])
                message["calls"][call.index][2] += call.function.arguments
            reason = choice.finish_reason or reason
    return message, reason


def test_a_call_comes_with_its_arguments_and_asks_for_an_answer(api: Api) -> None:
    api.backend.script = says(CALLS)
    answer = ask(api, tools=TOOLS)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Berlin"})
    assert choice.message.reasoning_content == choice.message.reasoning == "He asks."

    streamed, reason = joined(ask(api, tools=TOOLS, stream=True))
    assert reason == "tool_calls" and streamed["content"] == "" and streamed["reasoning"] == "He asks."
    [(call_id, name, arguments)] = streamed["calls"]
    assert (name, arguments) == ("weather", call.function.arguments)
    assert call_id.startswith("call_") and call_id != call.id


def test_the_tools_and_the_history_of_calls_reach_the_template(api: Api) -> None:
    called = ask_calls(api)
    history = [
        *ASK,
        {**called, "reasoning_content": "He asks."},
        {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "rain"},
    ]
    api.backend.script = says(ANSWER)
    api.client.chat.completions.create(model="ernie-tiny", messages=history, tools=TOOLS)
    prompt = api.backend.tokenizer.decode(api.backend.requests[-1].prompt_token_ids)
    assert prompt == (
        '[weather: {"type": "object", "properties": {"city": {"type": "string"}}}]'
        "user: How is the weather in Berlin?"
        "assistant: (He asks.)<tool_call>weather Berlin</tool_call>"
        "tool: rainassistant: <think>\n"
    )


def ask_calls(api: Api) -> dict[str, Any]:
    api.backend.script = says(CALLS)
    message: dict[str, Any] = (
        ask(api, tools=TOOLS).choices[0].message.model_dump(include={"role", "content", "tool_calls"})
    )
    return message


def test_reasoning_is_told_from_the_answer_and_counted(api: Api) -> None:
    api.backend.script = says(ANSWER)
    answer = ask(api)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("It is a <nice> day.", "I know it.")
    num_reasoning = len(api.backend.tokenizer.encode("I know it.\n</think>"))
    assert answer.usage.completion_tokens_details.reasoning_tokens == num_reasoning
    assert answer.usage.completion_tokens == len(api.backend.tokenizer.encode(ANSWER))

    chunks = list(ask(api, stream=True, stream_options={"include_usage": True}))
    assert joined(chunks) == ({"content": "It is a <nice> day.", "reasoning": "I know it.", "calls": []}, "stop")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == num_reasoning


def test_reasoning_is_left_out_on_request_and_thinking_switched_off(api: Api) -> None:
    api.backend.script = says(ANSWER)
    message = ask(api, extra_body={"include_reasoning": False}).choices[0].message
    assert message.content == "It is a <nice> day." and not hasattr(message, "reasoning_content")
    api.backend.script = says("<response>Yes.</response>")
    for body in ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}):
        answer = ask(api, extra_body=body)
        assert answer.choices[0].message.content == "Yes."
        assert answer.usage.completion_tokens_details.reasoning_tokens == 0
        prompt = api.backend.tokenizer.decode(api.backend.requests[-1].prompt_token_ids)
        assert prompt.endswith("assistant:")


@pytest.mark.parametrize(
    "body",
    [
        {"thinking_token_budget": 5},
        {"reasoning_max_tokens": 5},
        {"thinking": {"type": "enabled", "budget_tokens": 5}},
    ],
)
def test_a_budget_of_thinking_closes_the_reasoning_of_a_model_that_marks_it(api: Api, body: dict[str, Any]) -> None:
    ask(api, extra_body=body)
    budget = api.backend.requests[-1].params.thinking
    tokenizer = api.backend.tokenizer
    assert budget is not None and (budget.num_tokens, budget.start_token_id) == (5, None)
    assert tokenizer.decode(budget.closing) == "\n</think>\n\n" and budget.end_token_id == tokenizer.token_id(
        "</think>"
    )
    ask(api, extra_body={**body, "enable_thinking": False})
    assert api.backend.requests[-1].params.thinking is None
    ask(api, extra_body={"thinking_token_budget": -1})
    assert api.backend.requests[-1].params.thinking is None


def test_a_user_who_writes_a_tag_opens_no_reasoning(api: Api) -> None:
    api.backend.script = says("Just text.")
    body = {"enable_thinking": False}
    messages: list[Any] = [{"role": "user", "content": "What does <think> mean?"}]
    answer = api.client.chat.completions.create(model="ernie-tiny", messages=messages, extra_body=body)
    assert answer.choices[0].message.content == "Just text."


def test_a_truncated_call_is_reported_as_such(api: Api) -> None:
    api.backend.script = says(CALLS[: CALLS.index("rlin")], FinishReason.LENGTH)
    for stream in (False, True):
        answer = ask(api, tools=TOOLS, stream=stream)
        if stream:
            message, reason = joined(answer)
            [(_, _, arguments)] = message["calls"]
        else:
            (choice,) = answer.choices
            reason, arguments = choice.finish_reason, choice.message.tool_calls[0].function.arguments
        assert reason == "length" and arguments == '{"city": "Be'


def test_calls_are_text_without_tools_and_one_is_shown_where_one_is_asked_for(api: Api) -> None:
    api.backend.script = says(CALLS)
    message = ask(api, tools=TOOLS, tool_choice="none").choices[0].message
    assert message.tool_calls is None and "<tool_call>" in message.content
    assert "[weather" not in api.backend.tokenizer.decode(api.backend.requests[-1].prompt_token_ids)
    api.backend.script = says(CALLS + CALLS.split("\n\n\n")[1])
    assert len(ask(api, tools=TOOLS).choices[0].message.tool_calls) == 2
    assert len(ask(api, tools=TOOLS, parallel_tool_calls=False).choices[0].message.tool_calls) == 1


def test_every_choice_has_calls_of_its_own_and_logprobs_stay_whole(api: Api) -> None:
    api.backend.script = says(CALLS)
    answer = ask(api, tools=TOOLS, n=2, logprobs=True)
    ids = [choice.message.tool_calls[0].id for choice in answer.choices]
    assert len(set(ids)) == 2
    num_tokens = len(api.backend.tokenizer.encode(CALLS))
    assert [len(choice.logprobs.content) for choice in answer.choices] == [num_tokens] * 2
    chunks = list(ask(api, tools=TOOLS, stream=True, logprobs=True))
    assert sum(len(chunk.choices[0].logprobs.content) for chunk in chunks) == num_tokens


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools", "not supported, only functions"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", r"tools\[0\] must be a function"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]},
            "tools",
            "must be a JSON schema",
        ),
        ({"tools": TOOLS * 129}, "tools", "at most 128"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "tool_choice": "must"}, "tool_choice", "none, auto, required or"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "none of the tools",
        ),
        ({"thinking": {"type": "maybe"}}, "thinking", "enabled"),
        ({"thinking": {"type": "enabled", "budget_tokens": -2}}, "thinking", "from 0"),
        ({"thinking_token_budget": -2}, "thinking_token_budget", "from 0"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "tool_call_id belongs to every message"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages", "an assistant's message"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}]},
            "messages",
            r"messages\[0\].tool_calls\[0\].function.arguments must be a JSON object",
        ),
    ],
)
def test_what_cannot_be_used_is_named(api: Api, fields: dict[str, Any], param: str, message: str) -> None:
    response = api.http.post("/v1/chat/completions", json={"messages": ASK, **fields})
    error = error_of(response)
    assert response.status_code == 400 and error["param"] == param
    assert re.search(message, error["message"])


def test_a_model_that_knows_no_tools_says_so() -> None:
    with open_api() as api, pytest.raises(openai.BadRequestError, match="its chat template takes none"):
        ask(api, tools=TOOLS)


def test_an_answer_goes_on_from_the_last_message(api: Api) -> None:
    messages: list[Any] = [*ASK, {"role": "assistant", "content": ""}]
    for content in ("It is ", "It is <think>"):
        messages[-1] = {"role": "assistant", "content": content}
        body = {"continue_final_message": True, "add_generation_prompt": False}
        api.client.chat.completions.create(model="ernie-tiny", messages=messages, extra_body=body)
        prompt = api.backend.tokenizer.decode(api.backend.requests[-1].prompt_token_ids)
        assert prompt.rstrip().endswith(content.rstrip()) and "assistant: It is" in prompt
    api.backend.script = says("rainy.")
    messages[-1] = {"role": "assistant", "content": "It is "}
    body = {"continue_final_message": True, "echo": True, "enable_thinking": False}
    for stream in (False, True):
        answer = api.client.chat.completions.create(
            model="ernie-tiny", messages=messages, extra_body=body, stream=stream
        )
        assert (joined(answer)[0]["content"] if stream else answer.choices[0].message.content) == "It is rainy."
    told = {"messages": messages, "continue_final_message": True, "chat_template_kwargs": {"enable_thinking": False}}
    tokens = api.http.post("/tokenize", json=told).json()["tokens"]
    assert tokens == list(api.backend.requests[-1].prompt_token_ids)
    for wrong in ({"messages": ASK}, {"messages": messages, "add_generation_prompt": True}):
        for path in ("/v1/chat/completions", "/tokenize"):
            response = api.http.post(path, json={"continue_final_message": True, **wrong})
            assert response.status_code == 400 and error_of(response)["param"] == "continue_final_message"


def test_max_tokens_beyond_the_room_are_cut_where_that_is_asked_for(api: Api) -> None:
    body = {"messages": ASK, "max_tokens": 100_000}
    assert api.http.post("/v1/chat/completions", json=body).status_code == 400
    assert api.http.post("/v1/chat/completions", json={**body, "clamp_max_tokens": True}).status_code == 200
    request = api.backend.requests[-1]
    assert request.params.max_tokens == 512 - len(request.prompt_token_ids)


def test_a_long_prompt_is_cut_to_its_end_where_that_is_asked_for(api: Api) -> None:
    whole = api.backend.tokenizer.encode("word " * 700)
    for prompt in ("word " * 700, whole):
        body = {"prompt": prompt, "max_tokens": 12}
        assert api.http.post("/v1/completions", json=body).status_code == 400
        for asked, kept in ((100, 100), (-1, 500)):
            response = api.http.post("/v1/completions", json={**body, "truncate_prompt_tokens": asked})
            assert response.status_code == 200 and response.json()["usage"]["prompt_tokens"] == kept
            assert api.backend.requests[-1].prompt_token_ids == tuple(whole[-kept:])
    answer = api.http.post("/v1/chat/completions", json={"messages": ASK, "truncate_prompt_tokens": 5, "max_tokens": 2})
    assert answer.json()["usage"]["prompt_tokens"] == 5
    assert api.http.post("/v1/completions", json={"prompt": "x", "truncate_prompt_tokens": 0}).status_code == 400


def test_parsers_are_chosen_by_name_where_the_template_does_not_tell(thinking_folder: Path) -> None:
    config = ApiConfig(reasoning_parser="none", tool_parser="none")
    with open_api(config, checkpoint=thinking_folder) as api:
        api.backend.script = says(ANSWER)
        assert ask(api).choices[0].message.content == Tokenizer.load(thinking_folder).decode(
            Tokenizer.load(thinking_folder).encode(ANSWER), skip_special_tokens=True
        )
        with pytest.raises(openai.BadRequestError, match="tool_parser names no format"):
            ask(api, tools=TOOLS)
