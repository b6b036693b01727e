"""Turns the text of one choice into the fields of a chat message: content, reasoning, tool calls; writes no JSON."""

from __future__ import annotations

from typing import Any

from router.api.formats.reader import CallArguments, CallStarted, Content, OutputReader, Reasoning
from router.api.job_progress import Choice
from router.api.translate import Job
from workers.request import FinishReason, Output


class MessageReader:
    """Reads the outputs of one choice in their order and keeps account of its reasoning tokens."""

    def __init__(self, job: Job, choice: Choice) -> None:
        speech = job.speech
        self._choice = choice
        self._speech = speech
        self._job_id = job.job_id
        self._prefix = speech.prefix
        self._reader = OutputReader(speech.form, speech.opens_reasoning, speech.max_calls)

    def read(self, output: Output) -> dict[str, Any]:
        """The fields of a delta that show this output; empty when all of it is held back, or not to be shown."""
        was_reasoning = self._reader.is_reasoning
        parts = self._reader.push(output.text)
        if was_reasoning:
            self._count(output)
        if output.finish_reason is not None:
            parts += self._reader.finish()
        fields: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        for part in parts:
            match part:
                case Reasoning(text):
                    if self._speech.include_reasoning:
                        fields["reasoning_content"] = fields.get("reasoning_content", "") + text
                case Content(text):
                    fields["content"] = fields.get("content", "") + self._prefix + text
                    self._prefix = ""
                case CallStarted(index, name):
                    calls.append(self._start(index, name))
                case CallArguments(index, text):
                    if not calls or calls[-1]["index"] != index:
                        calls.append({"index": index, "function": {"arguments": ""}})
                    calls[-1]["function"]["arguments"] += text
        if "reasoning_content" in fields:
            fields["reasoning"] = fields["reasoning_content"]
        if calls:
            fields["tool_calls"] = calls
        return fields

    def end(self, reason: FinishReason) -> str:
        """The finish_reason that a client is told: of an answer that ended by itself in calls, that it wants them answered."""
        return "tool_calls" if reason is FinishReason.STOP and self._reader.num_calls else reason.value

    def _start(self, index: int, name: str) -> dict[str, Any]:
        call_id = f"call_{self._job_id}{self._choice.index:03x}{index:02x}"
        return {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}

    def _count(self, output: Output) -> None:
        """Tokens up to the one that ends the reasoning; all of an output in which that one is not seen."""
        ids, end = output.token_ids, self._speech.reasoning_end
        has_ended = not self._reader.is_reasoning and end in ids
        self._choice.reasoning_tokens += ids.index(end) + 1 if has_ended and end is not None else len(ids)


def whole_message(job: Job, choice: Choice) -> tuple[dict[str, Any], str]:
    """The message of a finished choice, without its role, and its finish_reason."""
    reader = MessageReader(job, choice)
    message: dict[str, Any] = {"content": None, "refusal": None}
    calls: list[dict[str, Any]] = []
    texts: dict[str, list[str]] = {}
    for output in choice.outputs:
        fields = reader.read(output)
        for call in fields.pop("tool_calls", ()):
            if "id" in call:
                calls.append({name: call[name] for name in ("id", "type", "function")})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        for name, text in fields.items():
            texts.setdefault(name, []).append(text)
    message |= {name: "".join(pieces) for name, pieces in texts.items()}
    if calls:
        message["tool_calls"] = calls
    elif message["content"] is None:
        message["content"] = ""
    assert choice.finish_reason is not None
    return message, reader.end(choice.finish_reason)
