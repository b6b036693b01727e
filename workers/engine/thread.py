"""Runs an Engine on a thread of its own and passes commands in and results out; the only place where the two worlds meet."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from workers.engine.engine import Engine
from workers.engine.messages import (
    AddMigrant,
    AddSequence,
    BeginMove,
    CancelSequence,
    DumpKv,
    EndMove,
    EngineCommand,
    ForgetCache,
    Halt,
    HoldPrefix,
    Landed,
    LayersFilled,
    MovedIn,
    Pulled,
    ReleasePrefix,
    Report,
    Resume,
    StepResult,
    StopEngine,
    TransferLost,
    Wake,
)
from workers.errors import InvalidRequest, Refused

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_COMMANDS = 4096
"""While so many wait, the step under way has taken so long that no new sequence is taken."""

MAX_NEW_TOKENS = 16384
"""Prompt tokens of new sequences that are taken between two steps, and one sequence beyond: each is looked through and hashed."""

STALL_CHECK_S = 0.5
"""A thread whose sequences all wait for somebody else looks again after this long at the latest."""


class EngineThread:
    """`on_report` is called on `loop` after every step that changed something, `on_layers` in the middle of a step that fills
    layers for another worker. Commands take effect in order.

    At most MAX_COMMANDS wait to be taken, and for each sequence that was added the few that concern it: those are always taken, so
    nobody who waits for what they bring about waits in vain.
    """

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        on_report: Callable[[Report], None],
        on_layers: Callable[[LayersFilled], None] | None = None,
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._on_report = on_report
        if on_layers is not None:

            def tell(event: LayersFilled) -> None:
                self._tell(on_layers, event)

            engine.outgoing.on_layers = tell
        self._commands: queue.SimpleQueue[EngineCommand] = queue.SimpleQueue()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._engine.on_ready(lambda: self._commands.put(Wake()))
        self._thread.start()

    def post(self, command: EngineCommand) -> bool:
        """False, and nothing happens: a new sequence, and too many commands wait."""
        if isinstance(command, AddSequence | AddMigrant) and self._commands.qsize() >= MAX_COMMANDS:
            return False
        self._commands.put(command)
        return True

    async def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after the step under way; what waits for it is not looked at any more."""
        self._is_stopping = True
        self._commands.put(StopEngine())  # it may wait for a command
        await asyncio.to_thread(self._thread.join, timeout_s)
        if self._thread.is_alive():
            log.error("the engine thread did not end within %s s", timeout_s)
        # Nobody is told any more, and what pointed here would keep the pool until the collector comes.
        self._engine.outgoing.on_layers = None
        self._engine.on_ready(lambda: None)

    def _run(self) -> None:
        stalled = False
        while True:
            if not self._take_commands(wait=stalled or not self._engine.has_work):
                return
            # A prompt that has landed has its first token, and a receiver waits for a sequence that stands still, as does a peer that
            # wants a prefix: none waits for the next step, which may be long.
            early = self._engine.take_early()
            if early is not None and not self._report(early):
                return
            result = self._engine.step()
            stalled = self._engine.made_no_progress
            if not self._report(result):
                return

    def _report(self, result: StepResult) -> bool:
        return self._tell(self._on_report, report_of(self._engine, result))

    def _tell(self, listener: Callable[[T], None], what: T) -> bool:
        """False when the event loop has closed: the process is ending."""
        try:
            self._loop.call_soon_threadsafe(listener, what)
        except RuntimeError:
            return False
        return True

    def _take_commands(self, wait: bool) -> bool:
        """Executes what is queued, but for what follows many new sequences; with `wait`, at least one or until the stall check. False:
        stop."""
        num_new = 0
        while num_new < MAX_NEW_TOKENS:
            try:
                timeout = STALL_CHECK_S if self._engine.has_work else None
                command = self._commands.get(timeout=timeout) if wait else self._commands.get_nowait()
            except queue.Empty:
                return True
            wait = False
            if self._is_stopping or isinstance(command, StopEngine):
                return False
            if isinstance(command, AddSequence | AddMigrant):
                num_new += len(command.request.prompt_token_ids)
            carry_out(self._engine, command)
        return True


def report_of(engine: Engine, result: StepResult) -> Report:
    """A result with what the engine looks like right behind it."""
    return Report(result, engine.load(), engine.counters(), engine.num_held_blocks, engine.prefill_tokens_per_s)


def carry_out(engine: Engine, command: EngineCommand) -> None:
    """Between two steps, on the thread that steps."""
    match command:
        case AddSequence():
            try:
                engine.add(command.sequence_id, command.request, command.kind, command.hint)
            except (InvalidRequest, Refused) as error:
                engine.refuse(command.sequence_id, command.request, error)
        case CancelSequence():
            engine.cancel(command.sequence_id)
        case Landed():
            engine.incoming.landed(command.sequence_id, command.sampled, command.cached_tokens, command.report)
        case TransferLost():
            engine.incoming.failed(command.sequence_id, command.report)
        case AddMigrant():
            try:
                engine.incoming.add_migrant(command.sequence_id, command.request)
            except (InvalidRequest, Refused) as error:
                engine.refuse(command.sequence_id, command.request, error)
        case MovedIn():
            engine.incoming.moved_in(command.sequence_id, command.known_token_ids, command.num_computed)
        case BeginMove():
            engine.export(command.sequence_id, command.first_block, command.num_blocks)
        case Halt():
            engine.moves.halt(command.sequence_id)
        case Resume():
            engine.moves.resume(command.sequence_id)
        case EndMove():
            engine.moves.end(command.sequence_id)
        case Pulled():
            engine.incoming.pulled(command.sequence_id, command.num_blocks)
        case HoldPrefix():
            engine.outgoing.hold_prefix(command.export_id, command.keys)
        case ReleasePrefix():
            engine.outgoing.release_prefix(command.export_id)
        case DumpKv(asker):
            engine.dump_cache(asker)
        case ForgetCache():
            engine.forget_cache()
        case Wake() | StopEngine():
            pass
