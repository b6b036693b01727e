"""Chat, tools, structure and streams as litellm asks for them, through OpenAI's two APIs and Anthropic's. litellm is no dependency of the tests: it
takes 140 MB. `pip install litellm` runs them."""

from __future__ import annotations

import json
import os
from typing import Any, Literal

import pytest
from fake_backend import Api
from pydantic import BaseModel, Field
from test_api_tools import ANSWER, ASK, CALLS, TOOLS, says

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks for prices when it is imported
litellm: Any = pytest.importorskip("litellm", reason="litellm takes 140 MB")

API_THINKS = True
BERLIN = {"city": "Berlin"}


class Order(BaseModel):
    size: Literal["small", "large"]
    count: int = Field(ge=1, le=99)


def ask(api: Api, provider: str = "openai", **fields: Any) -> Any:
    base = api.url if provider == "anthropic" else f"{api.url}/v1"
    return litellm.completion(
        model=f"{provider}/ernie-tiny", api_base=base, api_key="any", messages=ASK, max_retries=0, **fields
    )


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic"])
def test_an_answer_comes_whole_and_in_streams(api: Api, provider: str) -> None:
    api.backend.script = says(ANSWER)
    whole = ask(api, provider, max_tokens=200)
    (choice,) = whole.choices
    assert choice.message.content == "It is a <nice> day." and choice.finish_reason == "stop"
    assert choice.message.reasoning_content == "I know it."
    assert whole.usage.completion_tokens > 0
    chunks = list(ask(api, provider, stream=True, max_tokens=200, stream_options={"include_usage": True}))
    built = litellm.stream_chunk_builder(chunks)
    assert built.choices[0].message.content == choice.message.content
    assert built.choices[0].message.reasoning_content == choice.message.reasoning_content
    if provider != "hosted_vllm":  # there litellm counts tokens itself
        assert built.usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic"])
def test_tools_are_called_whole_and_in_streams(api: Api, provider: str) -> None:
    api.backend.script = says(CALLS)
    whole = ask(api, provider, tools=TOOLS, max_tokens=200)
    streamed = litellm.stream_chunk_builder(list(ask(api, provider, tools=TOOLS, stream=True, max_tokens=200)))
    for answer in (whole, streamed):
        (choice,) = answer.choices
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and call.function.name == "weather"
        assert json.loads(call.function.arguments) == BERLIN


def test_an_answer_is_bound_to_a_class(api: Api) -> None:
    extra = {"enable_thinking": False}
    whole = ask(api, response_format=Order, extra_body=extra, seed=2)
    Order.model_validate_json(whole.choices[0].message.content)
    chunks = list(ask(api, response_format=Order, extra_body=extra, seed=2, stream=True))
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content == whole.choices[0].message.content


def test_responses_come_whole_and_in_streams(api: Api) -> None:
    api.backend.script = says(ANSWER)
    base: Any = {"model": "openai/ernie-tiny", "api_base": f"{api.url}/v1", "api_key": "any", "input": "Hi"}
    whole = litellm.responses(**base)
    assert whole.output_text == "It is a <nice> day."
    kinds = [event.type for event in litellm.responses(**base, stream=True)]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"


def test_an_error_is_that_of_its_kind(api: Api) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(api, temperature=9)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(
            model="openai/ernie-tiny",
            api_base=f"{api.url}/v1",
            api_key="any",
            messages=[{"role": "user", "content": "long " * 2000}],
            max_retries=0,
        )
