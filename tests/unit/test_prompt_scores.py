"""Log-probabilities of long prompts travel and are written in parts, and no part is large."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest
from builders import EOS, PlainDetokenizer, fake_layout, make_request
from fake_backend import MODEL, Api, score_prompt

from router.api.choice_fields import write_prompt_logprobs
from router.api.job_progress import Choice
from router.api.prompts import Prompt
from router.api.sse import json_parts, to_json
from router.backend import RequestStream
from workers.engine.engine import Engine
from workers.engine.fake_runner import FakeRunner
from workers.kv_memory.memory import KvMemory
from workers.request import Output, Request
from workers.runner import Batch, LayerHook, Sampled, SequenceSlice
from workers.scheduler.scheduler import Limits
from workers.serving.sessions import MAX_FRAME_BYTES, CacheEvents, Session
from workers.status import Load
from workers.token_logprobs import MAX_SCORES, PromptScores, join
from workers.wire.attach_protobuf import frame_from_pb, frame_to_pb

NUM_TOP = 20


def scores(first: int, token_ids: list[int], num_top: int = NUM_TOP) -> PromptScores:
    """Of each token: its number in the prompt, where it can be seen."""
    numbers = np.arange(first, first + len(token_ids))
    tops = np.broadcast_to(numbers[:, None], (len(token_ids), num_top))
    return PromptScores(
        first,
        np.array(token_ids, np.int32),
        -numbers.astype(np.float32),
        numbers.astype(np.int32),
        tops.astype(np.int32),
        -tops.astype(np.float32),
    )


class Scoring(FakeRunner):
    def execute(self, batch: Batch, on_layer: LayerHook | None = None) -> list[Sampled]:
        found = super().execute(batch, on_layer)
        pieces = (*batch.prefill, *batch.decode)
        return [
            Sampled(one.sequence_id, one.token_id, one.logprob, self._scored(piece))
            for one, piece in zip(found, pieces, strict=True)
        ]

    def _scored(self, piece: SequenceSlice) -> PromptScores | None:
        if piece.prompt_logprobs is None:
            return None
        following = [*piece.token_ids[1:], *(() if piece.next_token_id is None else (piece.next_token_id,))]
        return scores(piece.start + 1, following, piece.prompt_logprobs) if following else None


def scoring_engine(num_blocks: int, max_batch_tokens: int) -> Engine:
    return Engine(
        Scoring(KvMemory(fake_layout(num_blocks))),
        Limits(8, max_batch_tokens, 64, 0),
        make_detokenizer=lambda request: PlainDetokenizer(),
        eos_token_ids=(EOS,),
        max_model_len=100_000,
    )


def check_scores(request: Request, outputs: list[Output]) -> None:
    parts = [part for output in outputs for part in output.prompt_logprobs]
    assert all(len(part) <= MAX_SCORES for part in parts)
    assert join(parts) == scores(1, list(request.prompt_token_ids[1:]))
    first_token = next(index for index, output in enumerate(outputs) if output.token_ids)
    assert not any(output.prompt_logprobs for output in outputs[first_token:])


def test_frames_with_prompt_logprobs_stay_small_and_say_each_once() -> None:
    engine = scoring_engine(2000, 20_000)
    session = Session(1, "router-0")
    requests = [make_request([5 + i] * 30_000, 2, prompt_logprobs=NUM_TOP, request_id=str(i)) for i in range(3)]
    for i, request in enumerate(requests):
        engine.add(i, request)
    while engine.has_work:
        for _, output in engine.step().outputs:
            session.outputs.append(output)
    heard: dict[str, list[Output]] = {}
    num_frames = 0
    while session.outputs:
        message = frame_to_pb(session.take_frame(1, Load(), CacheEvents(), None))
        num_frames += 1
        assert message.ByteSize() < MAX_FRAME_BYTES + (1 << 20)
        for output in frame_from_pb(message).outputs:
            heard.setdefault(output.request_id, []).append(output)
    assert num_frames > 1
    for i, request in enumerate(requests):
        check_scores(request, heard[str(i)])


def test_a_prompt_that_is_computed_again_does_not_say_its_logprobs_again() -> None:
    engine = scoring_engine(14, 8)
    first, second = make_request(range(10, 190), 300), make_request(range(10, 600), 2, prompt_logprobs=NUM_TOP)
    engine.add(1, first)
    engine.add(2, second)
    outputs = []
    for _ in range(2000):
        outputs += [output for owner, output in engine.step().outputs if owner == 2]
    assert dict(engine.counters())["preemptions"] > 0
    check_scores(second, outputs)


def test_outputs_that_wait_for_a_slow_client_keep_all_parts() -> None:
    stream = RequestStream("r", 100, lambda name: None)
    parts = [scores(start, [7] * 5, 1) for start in (1, 6)]
    outputs = [*(Output("r", 0, prompt_logprobs=(part,)) for part in parts), Output("r", 0, (3,), cached_tokens=4)]
    assert all(stream.push(output) for output in outputs)
    assert stream.take(lambda: None) == Output("r", 0, (3,), cached_tokens=4, prompt_logprobs=tuple(parts))


def test_a_long_answer_is_written_in_small_parts_as_it_would_be_at_once(served: Api) -> None:
    tokenizer, token_ids = served.backend.tokenizer, tuple(300 + i % 1000 for i in range(5000))
    request = make_request(token_ids)
    choice = Choice(0, Prompt(token_ids), request, [], prompt_logprobs=score_prompt(token_ids, NUM_TOP))
    parts = list(
        json_parts({"a": write_prompt_logprobs(tokenizer, choice, NUM_TOP), "b": [1] * 100, "c": {}, "d": ["x"]})
    )
    assert max(map(len, parts)) < 1 << 18
    written = json.loads("".join(parts))
    assert "".join(parts) == to_json(written)
    assert written["b"] == [1] * 100 and written["c"] == {} and written["a"][0] is None
    assert [str(token_id) in entry for token_id, entry in zip(token_ids[1:], written["a"][1:], strict=True)] == [
        True
    ] * 4999


class WhoAsks:
    """Counts tokens that are written on an event loop, and beside it."""

    def __init__(self, api: Api) -> None:
        self._tokenizer, self.num_on_loop, self.num_beside = api.backend.tokenizer, 0, 0
        self._text = self._tokenizer.token_text

    def __enter__(self) -> WhoAsks:
        self._tokenizer.token_text = self  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *exc: object) -> None:
        del self._tokenizer.token_text

    def __call__(self, token_id: int) -> str:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.num_beside += 1
        else:
            self.num_on_loop += 1
        return self._text(token_id)


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 20}, {"echo": True, "logprobs": 20}])
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_long_prompt_are_written_beside_the_event_loop(
    served: Api, fields: dict[str, Any], stream: bool
) -> None:
    served.backend.reset()
    body = {"model": MODEL.name, "prompt": [300 + i for i in range(400)], "max_tokens": 3, "stream": stream, **fields}
    with WhoAsks(served) as asked:
        answer = served.http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert asked.num_beside > 400 * 20
    assert asked.num_on_loop <= 3 * 21  # a token that follows is no work for a thread
    if not stream:
        choice = answer.json()["choices"][0]
        given = choice["prompt_logprobs"] if "prompt_logprobs" in fields else choice["logprobs"]["top_logprobs"][:400]
        assert len(given) == 400 and given[0] is None and all(given[1:])


def test_more_prompt_logprobs_than_the_bound_are_refused_with_figures(served: Api) -> None:
    body = {"model": MODEL.name, "prompt": [300] * 400, "max_tokens": 3, "n": 128, "prompt_logprobs": 20}
    refused = served.http.post("/v1/completions", json=body | {"prompt": [[300] * 400] * 3})
    assert refused.status_code == 400 and "3225600" in refused.json()["error"]["message"]
