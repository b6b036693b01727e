"""/v1/responses as the openai client sees it: items, events, history, and what is kept."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from fake_backend import Api, error_of
from pydantic import BaseModel
from test_api_tools import ANSWER, CALLS, says

from router.api.response_store import ResponseStore, Stored
from workers.request import FinishReason

API_THINKS = True

CITY = {"type": "object", "properties": {"city": {"enum": ["Berlin", "Paris"]}}, "required": ["city"], "additionalProperties": False}  # fmt: skip
TOOLS: list[Any] = [{"type": "function", "name": "weather", "parameters": CITY, "strict": True}]


def ask(api: Api, **fields: Any) -> Any:
    return api.client.responses.create(model="ernie-tiny", **{"input": "How is the weather?", **fields})


def prompt_of(api: Api) -> str:
    return api.backend.tokenizer.decode(api.backend.requests[-1].prompt_token_ids)


def test_an_answer_comes_as_items_with_its_usage(api: Api) -> None:
    api.backend.script = says(ANSWER)
    response = ask(api, instructions="Be brief.", metadata={"a": "b"})
    assert response.output_text == "It is a <nice> day." and response.status == "completed"
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == "I know it."
    assert response.usage.input_tokens == len(api.backend.requests[-1].prompt_token_ids)
    assert response.usage.output_tokens_details.reasoning_tokens == len(
        api.backend.tokenizer.encode("I know it.\n</think>")
    )
    assert (response.instructions, response.metadata) == ("Be brief.", {"a": "b"}) and "system: Be brief." in prompt_of(
        api
    )


@pytest.mark.parametrize("said", [ANSWER, CALLS])
def test_a_stream_adds_up_to_the_whole_response(api: Api, said: str) -> None:
    api.backend.script = says(said)
    whole = ask(api, tools=TOOLS)
    with api.client.responses.stream(model="ernie-tiny", input="How is the weather?", tools=TOOLS) as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == len(whole.output)
    assert [shown(item) for item in streamed.output] == [shown(item) for item in whole.output]
    assert streamed.usage == whole.usage


def shown(item: Any) -> dict[str, Any]:
    fields: dict[str, Any] = item.model_dump(exclude_none=True)
    kept = {name: value for name, value in fields.items() if name not in ("id", "call_id", "parsed_arguments")}
    for part in kept.get("content", ()):
        part.pop("parsed", None)
    return kept


def test_calls_and_their_outputs_make_a_conversation(api: Api) -> None:
    api.backend.script = says(CALLS)
    called = ask(api, tools=TOOLS)
    (call,) = [item for item in called.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Berlin"})
    api.backend.script = says(ANSWER)
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
    ask(api, previous_response_id=called.id, input=result, tools=TOOLS)
    by_id = prompt_of(api)
    items = [
        {"role": "user", "content": "How is the weather?"},
        *(item.model_dump() for item in called.output),
        *result,
    ]
    ask(api, input=items, tools=TOOLS)
    assert prompt_of(api) == by_id
    assert "(He asks.)<tool_call>weather Berlin</tool_call>tool: rain" in by_id


def test_instructions_are_those_of_one_response(api: Api) -> None:
    api.backend.script = says(ANSWER)
    first = ask(api, instructions="Be brief.")
    ask(
        api,
        previous_response_id=first.id,
        input=[{"role": "user", "content": [{"type": "input_text", "text": "And now?"}]}],
    )
    assert "Be brief" not in prompt_of(api) and "It is a <nice> day.user: And now?" in prompt_of(api)


def test_the_form_of_an_answer_and_calls_are_enforced(api: Api) -> None:
    class Order(BaseModel):
        size: Literal["small", "large"]

    # Reasoning stands open in this model's prompts: that the answer is an object is seen in the grammar.
    ask(
        api,
        text={"format": {"type": "json_schema", "name": "x", "schema": Order.model_json_schema()}},
        max_output_tokens=1,
    )
    assert "%json" in api.backend.requests[-1].params.grammar
    ask(api, tools=TOOLS, tool_choice={"type": "function", "name": "weather"}, max_output_tokens=1)
    assert "weather" in api.backend.requests[-1].params.grammar


def test_what_was_cut_short_is_incomplete(api: Api) -> None:
    api.backend.script = says("</think>so it", FinishReason.LENGTH)
    response = ask(api, max_output_tokens=5)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[-1].status == "incomplete"
    events = list(ask(api, max_output_tokens=5, stream=True))
    assert events[-1].type == "response.incomplete"


def test_responses_are_kept_listed_and_deleted_unless_they_were_not_to_be(api: Api) -> None:
    api.backend.script = says(ANSWER)
    kept, other = ask(api), ask(api, store=False)
    assert api.client.responses.retrieve(kept.id) == kept
    assert [item.content for item in api.client.responses.input_items.list(kept.id)] == ["How is the weather?"]  # type: ignore[union-attr]
    streamed = list(ask(api, stream=True))[-1].response
    assert api.client.responses.retrieve(streamed.id).output_text == "It is a <nice> day."
    with pytest.raises(openai.BadRequestError, match="background"):
        api.client.responses.cancel(kept.id)
    api.client.responses.delete(kept.id)
    for gone in (kept.id, other.id, "resp_x"):
        with pytest.raises(openai.NotFoundError) as raised:
            api.client.responses.retrieve(gone)
        assert raised.value.code == "response_not_found"
    stranger = api.http.get(f"/v1/responses/{streamed.id}", headers={"authorization": "Bearer other"})
    assert stranger.status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True, "store": False}, "store"),
        ({"truncation": "auto"}, "truncation"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
    ],
)
def test_what_cannot_be_used_is_named(api: Api, fields: dict[str, Any], param: str) -> None:
    response = api.http.post("/v1/responses", json={"input": "x", **fields})
    assert response.status_code in (400, 404) and error_of(response)["param"] == param and not api.backend.requests


def test_a_stream_that_breaks_says_so_in_its_last_event(api: Api) -> None:
    api.backend.script = lambda backend, request: [*says("so it is")(backend, request)[:2], RuntimeError("broken")]
    events = list(ask(api, stream=True))
    assert events[-1].type == "response.failed" and events[-1].response.error.code == "internal_error"


def test_the_store_forgets_the_oldest_and_counts_what_it_keeps() -> None:
    store = ResponseStore(max_responses=3, max_bytes=100)
    for number, size in enumerate((10, 20, 30, 40, 101)):
        store.put(Stored(b"me", {"id": str(number)}, [], [], size))
    assert [store.get(str(n), b"me") is not None for n in range(5)] == [False, True, True, True, False]
    assert (len(store), store.num_bytes) == (3, 90) and store.get("3", b"you") is None
    store.put(Stored(b"me", {"id": "5"}, [], [], 60))
    assert (len(store), store.num_bytes) == (2, 100)
    store.put(Stored(b"me", {"id": "5"}, [], [], 60))
    assert (len(store), store.num_bytes) == (2, 100), "one that is put again counts once"
    store.put(Stored(b"you", {"id": "6"}, [], [], 30))
    store.put(Stored(b"you", {"id": "7"}, [], [], 25))
    assert [store.get("6", b"you") is None, store.get("5", b"me") is None] == [False, True], "who has most gives way"
    store.put(Stored(b"me", {"id": "5"}, [], [], 40))
    assert store.delete("5", b"me") and not store.delete("5", b"me") and store.num_bytes == 55
