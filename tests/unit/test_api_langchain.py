"""Tools and structured output as langchain-openai asks for them."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from fake_backend import Api
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from test_api_tools import CALLS, says

API_THINKS = True


class Order(BaseModel):
    """An order."""

    size: Literal["small", "large"]
    count: int = Field(ge=1, le=99)


def weather(city: Literal["Berlin", "Paris"]) -> str:
    """The weather of a city."""
    return f"rain in {city}"


def model(api: Api, **fields: Any) -> ChatOpenAI:
    extra = {"enable_thinking": False}
    return ChatOpenAI(
        model="ernie-tiny", base_url=f"{api.url}/v1", api_key="any", max_retries=0, extra_body=extra, **fields
    )


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_object_of_its_class(api: Api, method: str) -> None:
    chain = model(api, seed=2).with_structured_output(Order, method=method)  # type: ignore[arg-type]
    answer = chain.invoke("Two small ones.")
    assert isinstance(answer, Order)


def test_bound_tools_are_called_whole_and_in_streams(api: Api) -> None:
    api.backend.script = says(CALLS)
    bound = model(api).bind_tools([weather])
    (call,) = bound.invoke("How is the weather?").tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Berlin"})
    streamed: Any = None
    for chunk in bound.stream("How is the weather?"):
        streamed = chunk if streamed is None else streamed + chunk
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [("weather", {"city": "Berlin"})]


def test_a_call_can_be_required(api: Api) -> None:
    bound = model(api, seed=1).bind_tools([weather], tool_choice="weather", strict=True)
    (call,) = bound.invoke("How is the weather?").tool_calls
    assert call["args"]["city"] in ("Berlin", "Paris")
