"""A FakeBackend that keeps what it has said, as workers do: it is taken up in other pieces than it was said in, and without its text."""

from __future__ import annotations

import random
from typing import Any

from fake_backend import FakeBackend, FakeStream, Hang, Script, speak

from router.job_part import NO_JOB, FoundJob, JobPart
from router.wishes import NO_WISHES, Wishes
from workers.request import FinishReason, Output, Request, merged
from workers.text.tokenizer import Tokenizer
from workers.wire.attach import FoundRequest


class KeepingBackend(FakeBackend):
    def __init__(self, tokenizer: Tokenizer, script: Script = speak) -> None:
        super().__init__(tokenizer, script)
        self.tickets: dict[str, bytes] = {}
        self.said: dict[str, list[Output]] = {}
        self.is_kept = True
        self.is_whole = True
        self.chance = random.Random(7)
        self.parts: list[JobPart] = []
        self.ended: list[str] = []
        self.is_waiting = False
        """Everything waits at this router for a worker: no worker has any of it."""
        self.hang = Hang()
        """Released when a job is ended."""
        self.pause: Hang | None = None
        """What is taken up waits for it behind its first token."""

    def submit(self, request: Request, wishes: Wishes = NO_WISHES, part: JobPart = NO_JOB) -> FakeStream:
        self.parts.append(part)
        if not part.at:
            stream = super().submit(request, wishes, part)
            outputs: list[Any] = self.script(self, request)
            self.said[part.name] = [each for each in outputs if isinstance(each, Output)]
            if part.kept is not None and part.kept.ticket:
                self.tickets[part.kept.job] = part.kept.ticket
            return stream
        self.requests.append(request)
        self.wishes.append(wishes)
        said = self.said[part.name]
        if self.pause is None:
            return FakeStream(self, request, [*self._regrouped(said, request.request_id)])
        first, rest = (self._regrouped(some, request.request_id) for some in (said[:1], said[1:]))
        return FakeStream(self, request, [*first, self.pause, *rest])

    def _regrouped(self, outputs: list[Output], request_id: str) -> list[Output]:
        groups: list[list[Output]] = [[]]
        for output in outputs:
            if groups[-1] and self.chance.random() < 0.5:
                groups.append([])
            groups[-1].append(output)
        return [merged(group)._replace(request_id=request_id, text="lost") for group in groups]

    async def find(self, job: str, ends: bool = False) -> FoundJob:
        if ends:
            self.ended.append(job)
            self.hang.release()
        ticket = self.tickets.get(job, b"")
        if self.is_waiting and ticket:
            return FoundJob(ticket, is_waiting=True)
        names = [name for name in self.said if name.startswith(job)] if self.is_kept else []
        found = {name: ("decode-0", self._found(name)) for name in names}
        return FoundJob(ticket if names else b"", found)

    def _found(self, name: str) -> FoundRequest:
        outputs = self.said[name]
        reason = FinishReason(outputs[-1].finish_reason) if outputs[-1].finish_reason else None
        return FoundRequest(name, 5, sum(len(o.token_ids) for o in outputs), 0, reason, self.is_whole)
