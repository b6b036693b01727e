"""/v1/chat/completions: how a chat answer is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from router.api.answer import Answer
from router.api.asking import AnswerKind, Reading, read_asked
from router.api.choice_fields import (
    OF_NO_PROMPT,
    OF_NO_SERVICE,
    LogprobWriter,
    about_prompt,
    end_of_choice,
    end_of_piece,
    more_fields,
)
from router.api.chunk_writer import ChunkWriter
from router.api.job_progress import Choice, JobProgress
from router.api.message import MessageReader, whole_message
from router.api.plain_route import plain_post
from router.api.schema import ChatBody, parse_body
from router.api.services import Services
from router.api.shapes import Shape, usage_and_trace
from router.api.sse import lazy_each, lazy_list, to_json
from router.api.translate import Job, translate_chat
from workers.request import Output
from workers.text.tokenizer import Tokenizer


def chat_routes(services: Services) -> APIRouter:
    routes = APIRouter()

    @plain_post(routes, "/v1/chat/completions")
    async def create_chat_completion(http: HttpRequest) -> Response:
        return Answer(services, await read_asked(http, services, CHAT), http.headers.get("last-event-id", ""))

    return routes


def _read(raw: bytes, reading: Reading) -> tuple[Job, Callable[[Job], Shape]]:
    tokenizer = reading.tokenizer
    job = translate_chat(parse_body(ChatBody, raw), reading.model, tokenizer, reading.config, reading.naming)
    return job, lambda job: ChatShape(job, tokenizer)


CHAT = AnswerKind("chat", _read)


class ChatShape:
    """The JSON of chat completions and their chunks."""

    is_counted = False

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._logprobs = LogprobWriter(tokenizer, job.tokens_as_ids, job.logprobs or 0)
        self._readers: dict[int, MessageReader] = {}
        """Of the choices of a stream, by index, where text has to be read to be shown."""

    def _fixed(self, kind: str) -> dict[str, Any]:
        job = self._job
        return {"id": f"chatcmpl-{job.job_id}", "object": kind, "created": job.created, "model": job.model}

    def writer(self, progress: JobProgress) -> ChunkWriter:
        return ChunkWriter(self._job, self, progress)

    @property
    def shows_text_alone(self) -> bool:
        job = self._job
        return not job.speech.is_read and job.logprobs is None and not job.return_token_ids

    def head(self) -> str:
        return f'{to_json(self._fixed("chat.completion.chunk"))[:-1]},"choices":['

    def first_piece(self, choice: Choice, output: Output) -> Iterable[str]:
        return (self.piece(choice, output, '"role":"assistant",'),)

    def piece(self, choice: Choice, output: Output, role: str = "") -> str:
        job = self._job
        if job.speech.is_read:
            delta, end = self._read(choice, output)
            if not delta:
                return ""
        else:
            delta, end = f'{{{role}"content":{to_json(output.text)}}}', end_of_piece(job, output)
        logprobs = "null" if job.logprobs is None else to_json({"content": self._logprobs.content(output.logprobs)})
        return f'{{"index":{choice.index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{end}}}'

    def _read(self, choice: Choice, output: Output) -> tuple[str, str]:
        """Delta and end of a piece whose text is read; no delta: there is nothing to be shown yet."""
        reader = self._readers.get(choice.index)
        if reader is None:
            reader = self._readers[choice.index] = MessageReader(self._job, choice)
        fields = reader.read(output)
        is_seen = output.logprobs or output.finish_reason or self._job.return_token_ids
        if choice.is_announced and not fields and not is_seen:
            return "", ""
        if not choice.is_announced:
            fields = {"role": "assistant", "content": "", **fields}
        reason = None if output.finish_reason is None else reader.end(output.finish_reason)
        return to_json(fields), end_of_piece(self._job, output, reason)

    def extras(self, choice: Choice) -> Iterable[str]:
        return more_fields(self._about_prompt(choice)) if choice.index == 0 else ()

    def whole(self, progress: JobProgress) -> dict[str, Any]:
        answer = self._fixed("chat.completion")
        shown = enumerate(progress.shown())
        if self._job.speech.is_read:  # now, and also what is not shown: usage counts what is read
            read = [whole_message(self._job, choice) for choice in progress.choices]
            choices = (self._choice(number, choice, *read[choice.index]) for number, choice in shown)
        else:
            choices = (self._choice(number, choice, _plain_message(choice), None) for number, choice in shown)
        answer["choices"] = lazy_each(choices)
        about_prompt = OF_NO_PROMPT | self._about_prompt(progress.choices[0])
        return answer | OF_NO_SERVICE | about_prompt | usage_and_trace(self._job, progress)

    def _choice(self, number: int, choice: Choice, message: dict[str, Any], reason: str | None) -> dict[str, Any]:
        entries = [entry for output in choice.outputs for entry in output.logprobs]
        content = lazy_list(
            len(entries),
            lambda places: self._logprobs.content(entries[places.start : places.stop]),
            self._logprobs.size,
        )
        written: dict[str, Any] = {
            "index": number,
            "message": {"role": "assistant", **message},
            "logprobs": None if self._job.logprobs is None else {"content": content},
        }
        end = end_of_choice(self._job, choice)
        return written | end | ({"finish_reason": reason} if reason else {})

    def _about_prompt(self, choice: Choice) -> dict[str, Any]:
        """A conversation has one prompt, so what is said of it stands beside the choices."""
        return about_prompt(self._job, self._tokenizer, choice)


def _plain_message(choice: Choice) -> dict[str, Any]:
    return {"content": "".join(output.text for output in choice.outputs), "refusal": None}
