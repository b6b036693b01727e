"""/v1/chat/completions: how a chat answer is written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from router.api.answer import Answer, Services, read_job
from router.api.choice_fields import LogprobWriter, about_prompt, end_of_choice, end_of_piece, more_fields
from router.api.job_run import Choice, JobProgress
from router.api.schema import ChatBody
from router.api.sse import lazy_each, lazy_list, to_json
from router.api.translate import Job, translate_chat
from workers.request import Output
from workers.text.tokenizer import Tokenizer


def chat_routes(services: Services) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(http: HttpRequest) -> Response:
        job = await read_job(http, services, ChatBody, translate_chat)
        return Answer(services, job, ChatShape(job, services.tokenizer))

    return routes


class ChatShape:
    """The JSON of chat completions and their chunks."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._logprobs = LogprobWriter(tokenizer, job.tokens_as_ids, job.logprobs or 0)

    def _fixed(self, kind: str) -> dict[str, Any]:
        job = self._job
        return {"id": f"chatcmpl-{job.job_id}", "object": kind, "created": job.created, "model": job.model}

    def head(self) -> str:
        return f'{to_json(self._fixed("chat.completion.chunk"))[:-1]},"choices":['

    def piece(self, choice: Choice, output: Output) -> Iterable[str]:
        role = "" if choice.is_announced else '"role":"assistant",'
        logprobs = (
            "null" if self._job.logprobs is None else to_json({"content": self._logprobs.content(output.logprobs)})
        )
        end = end_of_piece(self._job, output)
        delta = f'{{{role}"content":{to_json(output.text)}}}'
        return (f'{{"index":{choice.index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{end}}}',)

    def extras(self, choice: Choice) -> Iterable[str]:
        return more_fields(self._about_prompt(choice)) if choice.index == 0 else ()

    def whole(self, progress: JobProgress) -> dict[str, Any]:
        answer = self._fixed("chat.completion")
        answer["choices"] = lazy_each(self._choice(choice) for choice in progress.choices)
        return answer | self._about_prompt(progress.choices[0])

    def _choice(self, choice: Choice) -> dict[str, Any]:
        entries = [entry for output in choice.outputs for entry in output.logprobs]
        content = lazy_list(len(entries), lambda places: self._logprobs.content(entries[places.start : places.stop]))
        text = "".join(output.text for output in choice.outputs)
        written: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if self._job.logprobs is None else {"content": content},
        }
        return written | end_of_choice(self._job, choice)

    def _about_prompt(self, choice: Choice) -> dict[str, Any]:
        """A conversation has one prompt, so what is said of it stands beside the choices."""
        return about_prompt(self._job, self._tokenizer, choice)
