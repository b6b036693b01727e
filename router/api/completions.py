"""/v1/completions: how a text completion is written, with echo and its four-list logprobs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from router.api.answer import Answer
from router.api.asking import AnswerKind, Reading, read_asked
from router.api.choice_fields import (
    OF_NO_PROMPT,
    OF_NO_SERVICE,
    CompletionLogprobs,
    LogprobWriter,
    about_prompt,
    end_of_choice,
    end_of_piece,
    more_fields,
)
from router.api.chunk_writer import ChunkWriter
from router.api.job_progress import Choice, JobProgress
from router.api.plain_route import plain_post
from router.api.schema import CompletionBody, parse_body
from router.api.services import Services
from router.api.shapes import Shape, usage_and_trace
from router.api.sse import json_parts, lazy_each, to_json
from router.api.translate import Job, translate_completion
from workers.request import Output
from workers.text.tokenizer import Tokenizer


def completion_routes(services: Services) -> APIRouter:
    routes = APIRouter()

    @plain_post(routes, "/v1/completions")
    async def create_completion(http: HttpRequest) -> Response:
        return Answer(services, await read_asked(http, services, COMPLETION), http.headers.get("last-event-id", ""))

    return routes


def _read(raw: bytes, reading: Reading) -> tuple[Job, Callable[[Job], Shape]]:
    tokenizer = reading.tokenizer
    body = parse_body(CompletionBody, raw)
    job = translate_completion(body, reading.model, tokenizer, reading.config, reading.naming)
    return job, lambda job: CompletionShape(job, tokenizer)


COMPLETION = AnswerKind("completion", _read)


class CompletionShape:
    """The JSON of text completions; chunks and whole answers have the same form."""

    is_counted = False

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._writer = LogprobWriter(tokenizer, job.tokens_as_ids, job.logprobs or 0)
        self._logprobs: dict[int, CompletionLogprobs] = {}
        """By choice; needed while a stream runs, because offsets go on from chunk to chunk."""

    def _fixed(self) -> dict[str, Any]:
        job = self._job
        return {"id": f"cmpl-{job.job_id}", "object": "text_completion", "created": job.created, "model": job.model}

    def writer(self, progress: JobProgress) -> ChunkWriter:
        return ChunkWriter(self._job, self, progress)

    @property
    def shows_text_alone(self) -> bool:
        return self._job.logprobs is None and not self._job.return_token_ids

    def head(self) -> str:
        return f'{to_json(self._fixed())[:-1]},"choices":['

    def piece(self, choice: Choice, output: Output) -> str:
        end, text = end_of_piece(self._job, output), to_json(output.text)
        logprobs = "null" if self._job.logprobs is None else to_json(self._scores(choice, [output]))
        return f'{{"index":{choice.index},"text":{text},"logprobs":{logprobs},"finish_reason":{end}}}'

    def first_piece(self, choice: Choice, output: Output) -> Iterator[str]:
        yield f'{{"index":{choice.index},"text":{to_json(self._echo(choice) + output.text)},"logprobs":'
        yield from json_parts(None if self._job.logprobs is None else self._scores(choice, [output]))
        yield f',"finish_reason":{end_of_piece(self._job, output)}'
        yield from more_fields(self._about_prompt(choice))
        yield "}"

    def extras(self, choice: Choice) -> Iterable[str]:
        return ()

    def whole(self, progress: JobProgress) -> dict[str, Any]:
        choices = lazy_each(self._choice(number, choice) for number, choice in enumerate(progress.shown()))
        return {**self._fixed(), "choices": choices, **OF_NO_SERVICE, **usage_and_trace(self._job, progress)}

    def _choice(self, number: int, choice: Choice) -> dict[str, Any]:
        written: dict[str, Any] = {
            "index": number,
            "text": self._echo(choice) + "".join(output.text for output in choice.outputs),
            "logprobs": None if self._job.logprobs is None else self._scores(choice, choice.outputs),
        }
        return written | end_of_choice(self._job, choice) | OF_NO_PROMPT | self._about_prompt(choice)

    def _echo(self, choice: Choice) -> str:
        if not self._job.echo:
            return ""
        prompt = choice.prompt
        return prompt.text if prompt.text is not None else self._tokenizer.decode(prompt.token_ids)

    def _scores(self, choice: Choice, outputs: list[Output]) -> dict[str, Any]:
        if choice.index not in self._logprobs:
            self._logprobs[choice.index] = CompletionLogprobs(self._writer, self._tokenizer, choice, self._job.echo)
        return self._logprobs[choice.index].piece([entry for output in outputs for entry in output.logprobs])

    def _about_prompt(self, choice: Choice) -> dict[str, Any]:
        """Each choice names its own prompt: there may be several."""
        return about_prompt(self._job, self._tokenizer, choice)
