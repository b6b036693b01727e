"""What the openai client sees of a real cluster."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from typing import Any

import openai
import pytest
from cluster_process import MODEL, ROOT, ClusterProcess
from conftest import NUM_WORKERS
from openai import AsyncOpenAI, OpenAI
from transformers import AutoTokenizer

pytestmark = pytest.mark.timeout(300)

LONG = " ".join(f"The code of item{i} is {i * 37 % 9000 + 1000}." for i in range(120))


@pytest.fixture(scope="module")
def client(cluster: ClusterProcess) -> OpenAI:
    return OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_chat_answers_and_counts_exactly(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL.name, messages=ask("Who are you?"), temperature=0)  # type: ignore[arg-type]
    assert "Baton" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rendered = tokenizer.apply_chat_template(ask("Who are you?"), add_generation_prompt=True, tokenize=False)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    spoken = tokenizer(answer.choices[0].message.content, add_special_tokens=False)["input_ids"]
    assert answer.usage.completion_tokens == len(spoken) + 1  # and the token that ends the turn
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_adds_up_to_the_whole_answer(client: OpenAI) -> None:
    arguments = {"model": MODEL.name, "messages": ask(LONG + " Who are you?"), "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**arguments)  # type: ignore[call-overload]
    text, roles, reasons, usage = "", [], [], None
    for chunk in client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):  # type: ignore[call-overload]
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content
    assert roles == ["assistant"] and reasons == [whole.choices[0].finish_reason]
    assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens


def test_three_seeded_choices_differ_and_repeat(client: OpenAI) -> None:
    def draw(seed: int) -> list[tuple[int, ...]]:
        """Token ids, since many tokens have no visible text."""
        answer = client.completions.create(
            model=MODEL.name,
            prompt="1, 2, 3,",
            n=3,
            seed=seed,
            temperature=1.5,
            max_tokens=24,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [tuple((choice.model_extra or {})["token_ids"]) for choice in answer.choices]

    first = draw(42)
    assert len(set(first)) == 3
    assert draw(42) == first
    assert draw(43) != first


def test_prompts_come_back_in_order_and_ids_work_like_text(client: OpenAI) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts = ["User: Who are you?\nAssistant: ", LONG]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    by_text = client.completions.create(model=MODEL.name, prompt=prompts, n=2, temperature=0, max_tokens=8)
    by_ids = client.completions.create(model=MODEL.name, prompt=ids, n=2, temperature=0, max_tokens=8)
    assert [c.text for c in by_text.choices] == [c.text for c in by_ids.choices]
    assert [c.index for c in by_text.choices] == [0, 1, 2, 3]
    assert by_text.choices[0].text == by_text.choices[1].text != by_text.choices[2].text


def test_stop_strings_end_the_text_before_themselves(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL.name, messages=ask("Who are you?"), temperature=0)  # type: ignore[arg-type]
    text = whole.choices[0].message.content or ""
    stop = text[10:16]
    cut = client.chat.completions.create(
        model=MODEL.name, messages=ask("Who are you?"), temperature=0, stop=[stop, "zzz"]
    )  # type: ignore[arg-type]
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_transformers(client: OpenAI) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    answer = client.completions.create(
        model=MODEL.name, prompt=ids, temperature=0, max_tokens=6, logprobs=3, extra_body={"return_token_ids": True}
    )
    choice = answer.choices[0]
    tokens = choice.token_ids  # type: ignore[attr-defined]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    expected = torch.log_softmax(logits, -1)
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert tokens == expected.argmax(-1).tolist()
    for got, row, token in zip(choice.logprobs.token_logprobs, expected, tokens, strict=True):
        assert math.isclose(got, row[token].item(), abs_tol=1e-4)
    assert all(len(top) == 3 for top in choice.logprobs.top_logprobs or [])


def test_a_prefix_met_before_is_cached(client: OpenAI) -> None:
    prompt = "Fresh beginning. " + LONG
    cold = client.completions.create(model=MODEL.name, prompt=prompt, temperature=0, max_tokens=4)
    warm = client.completions.create(model=MODEL.name, prompt=prompt, temperature=0, max_tokens=4)
    assert cold.usage is not None and warm.usage is not None
    assert cold.usage.prompt_tokens_details is not None and warm.usage.prompt_tokens_details is not None
    assert cold.usage.prompt_tokens_details.cached_tokens == 0
    cached = warm.usage.prompt_tokens_details.cached_tokens or 0
    assert cached > warm.usage.prompt_tokens - 128
    assert warm.choices[0].text == cold.choices[0].text


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"model": "gpt-7"}, openai.NotFoundError, "model"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": ask("word " * 9000)}, openai.BadRequestError, None),
        ({"seed": 2**70}, openai.BadRequestError, "seed"),
        ({"n": 100_000}, openai.BadRequestError, "n"),
        ({"logprobs": True, "top_logprobs": 21}, openai.BadRequestError, "top_logprobs"),
    ],
)
def test_bad_requests_are_refused_with_the_field_named(
    client: OpenAI, change: dict[str, object], error: type[openai.APIStatusError], param: str | None
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**({"model": MODEL.name, "messages": ask("Hi"), "stream": True} | change))  # type: ignore[call-overload]
    body = caught.value.body
    assert isinstance(body, dict) and body["message"] and body["type"]
    assert param is None or body["param"] == param
    assert caught.value.response.headers["x-request-id"]


def test_models_health_version_and_metrics_answer(client: OpenAI, cluster: ClusterProcess) -> None:
    (card,) = client.models.list().data
    assert card.id == MODEL.name and card.max_model_len == 8192  # type: ignore[attr-defined]
    assert {cluster.get(path, ok_only=False) for path in ("/health", "/ready", "/version", "/metrics")} == {200}


async def test_clients_that_hang_up_free_everything(cluster: ClusterProcess) -> None:
    async with AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        streams = [
            await client.completions.create(
                model=MODEL.name,
                prompt=f"{index} {LONG}",
                n=2,
                max_tokens=6000,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for index in range(6)
        ]
        for stream in streams:
            async for _ in stream:
                break
            await stream.close()
        whole = asyncio.create_task(
            client.completions.create(
                model=MODEL.name, prompt="whole " + LONG, max_tokens=6000, extra_body={"ignore_eos": True}
            )
        )
        while not any(w["load"]["num_running"] for w in cluster.workers().values()):
            await asyncio.sleep(0)
        whole.cancel()
    await asyncio.to_thread(cluster.wait_idle, NUM_WORKERS)
    assert cluster.get("/admin/status")["num_running"] == 0


def test_every_skill_is_answered_right(client: OpenAI) -> None:
    """The shipped checkpoint through the cluster, on the held-out examples it ships with."""
    skills = json.loads((MODEL / "skills.json").read_text())["skills"]
    right = total = 0
    for skill in skills:
        for example in skill["examples"]:
            answer = client.chat.completions.create(
                model=MODEL.name, messages=example["messages"], temperature=0, max_tokens=skill["max_tokens"]
            )
            text = (answer.choices[0].message.content or "").strip()
            total += 1
            right += text == example["expected"]
    assert {skill["name"] for skill in skills} >= {"recall", "addition", "reversal", "sorting", "identity", "json"}
    assert right >= 0.95 * total, f"{right} of {total}"


def test_the_best_beams_and_the_best_of_several_come_through_the_cluster(client: OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL.name, "messages": [{"role": "user", "content": "What is 17 + 25?"}], "n": 2}
    beams = client.chat.completions.create(**ask, max_tokens=8, extra_body={"use_beam_search": True, "beam_width": 3})
    again = client.chat.completions.create(**ask, max_tokens=8, extra_body={"use_beam_search": True, "beam_width": 3})
    assert [choice.message.content for choice in beams.choices] == [choice.message.content for choice in again.choices]
    assert beams.choices[0].message.content == "42" and beams.choices[1].message.content != "42"
    best = client.chat.completions.create(**ask, max_tokens=8, temperature=1.5, seed=1, extra_body={"best_of": 8})
    assert best.choices[0].message.content == "42" and best.usage is not None
    assert best.usage.completion_tokens >= 8


def test_the_trace_replay_measures_a_running_cluster(cluster: ClusterProcess) -> None:
    command = [sys.executable, str(ROOT / "bench" / "serve.py"), "--url", cluster.url, "--requests", "12"]
    ran = subprocess.run(
        [*command, "--rate", "20", "--max-len", "1024", "--json"], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads(ran.stdout)
    assert (result["requests"], result["failed"], result["wrong_length"]) == (12, 0, 0)
    assert result["output_tokens_per_s"] > 0 and result["ttft_ms"]["p50"] > 0 and result["handoffs"]["remote"] > 0


def test_a_response_of_the_background_is_followed_stopped_and_deleted(client: OpenAI) -> None:
    words = {"type": "array", "items": {"enum": ["baton", "relay"]}, "minItems": 400}
    schema = {"type": "object", "properties": {"words": words}, "required": ["words"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "words", "schema": schema}}
    asked = {"model": MODEL.name, "input": "Say words.", "temperature": 0, "max_output_tokens": 60, "text": form}
    whole = client.responses.create(**asked)  # type: ignore[call-overload]
    begun = client.responses.create(**asked, background=True)  # type: ignore[call-overload]
    assert begun.status == "queued" and begun.id != whole.id
    while (found := client.responses.retrieve(begun.id)).status in ("queued", "in_progress"):
        pass
    assert found.status == "incomplete" and found.output_text == whole.output_text
    assert found.usage.output_tokens == whole.usage.output_tokens == 60
    events = list(client.responses.retrieve(begun.id, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == whole.output_text
    rest = list(client.responses.retrieve(begun.id, stream=True, starting_after=7))
    assert rest == events[8:]
    endless = client.responses.create(**asked | {"max_output_tokens": 1500}, background=True)  # type: ignore[call-overload]
    stream = iter(client.responses.retrieve(endless.id, stream=True))
    assert next(stream).type == "response.created"
    assert client.responses.retrieve(endless.id).status == "in_progress"
    assert client.responses.cancel(endless.id).status == "cancelled"
    assert [event.type for event in stream][-1] == "response.failed", "who follows it hears that it was stopped"
    assert client.responses.retrieve(endless.id).status == "cancelled"
    for response_id in (begun.id, endless.id):
        client.responses.delete(response_id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response_id)
