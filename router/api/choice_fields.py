"""What both generating endpoints write of a choice in the same words: its end, its tokens, what is said of its prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from router.api.logprobs import write_prompt_logprobs
from router.api.progress import Choice
from router.api.sse import json_parts, to_json
from router.api.translate import Job
from workers.request import Output
from workers.text.tokenizer import Tokenizer


def end_of_piece(job: Job, output: Output, reason: str | None = None) -> str:
    """JSON of a streamed piece from the value of "finish_reason" on, without the closing brace. `reason`: the one to be told."""
    end = "null"
    if output.finish_reason is not None:
        end = f'"{reason or output.finish_reason.value}","stop_reason":{to_json(output.stop_reason)}'
    if job.return_token_ids:
        end += f',"token_ids":{to_json(output.token_ids)}'
    return end


def end_of_choice(job: Job, choice: Choice) -> dict[str, Any]:
    """The same of a whole answer."""
    fields: dict[str, Any] = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
    if job.return_token_ids:
        fields["token_ids"] = [token_id for output in choice.outputs for token_id in output.token_ids]
    return fields


def more_fields(fields: dict[str, Any]) -> Iterator[str]:
    """JSON of fields that follow others, in parts."""
    for name, value in fields.items():
        yield f",{to_json(name)}:"
        yield from json_parts(value)


def about_prompt(job: Job, tokenizer: Tokenizer, choice: Choice) -> dict[str, Any]:
    """Token ids and logprobs of a choice's prompt, where they were asked for."""
    fields: dict[str, Any] = {}
    if job.return_token_ids:
        fields["prompt_token_ids"] = choice.prompt.token_ids
    if job.prompt_logprobs is not None:
        fields["prompt_logprobs"] = write_prompt_logprobs(tokenizer, choice, job.prompt_logprobs)
    return fields
