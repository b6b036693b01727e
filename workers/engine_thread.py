"""Runs an Engine on a thread of its own and passes commands in and results out; the only place where the two worlds meet."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from workers.engine import Engine, StepResult, refusal_output
from workers.errors import InvalidRequest, Refused
from workers.request import HandoffReport, Request
from workers.runner import Sampled
from workers.scheduler.sequence import Kind
from workers.status import Load

log = logging.getLogger(__name__)

STALL_CHECK_S = 0.5
"""A thread whose sequences all wait for somebody else looks again after this long at the latest."""


@dataclass(frozen=True, slots=True)
class Add:
    sequence_id: int
    request: Request
    kind: Kind


@dataclass(frozen=True, slots=True)
class CancelSequence:
    """Also releases a sequence that was computed for another worker."""

    sequence_id: int


@dataclass(frozen=True, slots=True)
class Landed:
    sequence_id: int
    sampled: Sampled
    cached_tokens: int
    report: HandoffReport


@dataclass(frozen=True, slots=True)
class TransferLost:
    sequence_id: int
    report: HandoffReport


@dataclass(frozen=True, slots=True)
class DumpKv:
    pass


@dataclass(frozen=True, slots=True)
class ForgetCache:
    """Empty the prefix cache."""


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


Command = Add | CancelSequence | Landed | TransferLost | DumpKv | ForgetCache | _Stop


@dataclass(frozen=True, slots=True)
class Report:
    """One step as the event loop sees it."""

    result: StepResult
    load: Load
    counters: tuple[tuple[str, float], ...]
    num_held_blocks: int


class EngineThread:
    """`on_report` is called on `loop` after every step that changed something. Commands take effect in order.

    The command queue is bounded by the callers: each sequence has at most a handful of commands, and the number of
    sequences is bounded by the scheduler's queue.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, on_report: Callable[[Report], None]) -> None:
        self._engine = engine
        self._loop = loop
        self._on_report = on_report
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, command: Command) -> None:
        self._commands.put(command)

    async def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after the step under way."""
        self._commands.put(_Stop())
        await asyncio.to_thread(self._thread.join, timeout_s)
        if self._thread.is_alive():
            log.error("the engine thread did not end within %s s", timeout_s)

    def _run(self) -> None:
        stalled = False
        while True:
            extra = StepResult()
            if not self._take_commands(extra, wait=stalled or not self._engine.has_work):
                return
            result = self._engine.step()
            stalled = self._engine.made_no_progress
            result.outputs = extra.outputs + result.outputs
            result.kv_event = result.kv_event if extra.kv_event is None else extra.kv_event
            report = Report(result, self._engine.load(), self._engine.counters(), self._engine.num_held_blocks)
            try:
                self._loop.call_soon_threadsafe(self._on_report, report)
            except RuntimeError:
                return  # the event loop has closed: the process is ending

    def _take_commands(self, extra: StepResult, wait: bool) -> bool:
        """Executes what is queued; with `wait`, at least one or until the stall check. False: stop."""
        while True:
            try:
                timeout = STALL_CHECK_S if self._engine.has_work else None
                command = self._commands.get(timeout=timeout) if wait else self._commands.get_nowait()
            except queue.Empty:
                return True
            wait = False
            if isinstance(command, _Stop):
                return False
            self._execute(command, extra)

    def _execute(self, command: Command, extra: StepResult) -> None:
        engine = self._engine
        match command:
            case Add():
                try:
                    engine.add(command.sequence_id, command.request, command.kind)
                except (InvalidRequest, Refused) as error:
                    extra.outputs.append((command.sequence_id, refusal_output(command.request, error)))
            case CancelSequence():
                engine.cancel(command.sequence_id)
            case Landed():
                engine.landed(command.sequence_id, command.sampled, command.cached_tokens, command.report)
            case TransferLost():
                engine.transfer_failed(command.sequence_id, command.report)
            case DumpKv():
                extra.kv_event = engine.kv_dump()
            case ForgetCache():
                engine.forget_cache()
            case _Stop():
                pass
