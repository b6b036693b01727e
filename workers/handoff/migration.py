"""The sending end of a migration between an engine and a transfer: what is announced, when the sequence stands still, and for how long."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from workers.engine_thread import Command, Depart, Halt, Resume
from workers.engine_thread import Export as BeginExport
from workers.errors import Refusal, Refused
from workers.handoff.export import Export, Feed
from workers.kv_transfer.messages import OpenHandoff, Running, SequenceMoved
from workers.kv_transfer.pieces import Cut
from workers.kv_transfer.source import Broken, Filled
from workers.stepping.result import BlocksFinal, ExportEnded, ExportEvent, Halted


class RunningExporter:
    """Sequences that run here and go on elsewhere. `find` gives the engine's id of a request by its name on the wire.

    A sequence stands still for at most `max_pause_s`; if its receiver has not landed by then it goes on here.
    """

    def __init__(
        self,
        post: Callable[[Command], None],
        find: Callable[[str], int | None],
        max_pause_s: float,
        counters: Counter[str],
    ) -> None:
        self._post = post
        self._find = find
        self._max_pause_s = max_pause_s
        self._counters = counters
        self._running: dict[int, _RunningExport] = {}

    def open(self, opening: OpenHandoff, cut: Cut, feed: Feed) -> Export:
        """As Exporter.open."""
        assert isinstance(opening.subject, Running)
        name = opening.subject.request_id
        sequence_id = self._find(name)
        if sequence_id is None:
            raise Refused(Refusal.NOT_MOVABLE, f"no request {name} runs here")
        if sequence_id in self._running:
            raise Refused(Refusal.NOT_MOVABLE, f"{name} is being moved already")
        export = self._running[sequence_id] = _RunningExport(self, sequence_id, cut, feed)
        return export

    def hear(self, event: ExportEvent) -> None:
        """What the engine says of a sequence that is being moved."""
        export = self._running.get(event.sequence_id)
        if export is None:
            return
        match event:
            case BlocksFinal(_, blocks, first, end, is_all):
                export.may_halt = is_all
                export.num_fed = export.cut.pieces_before(end)
                export.feed(Filled(blocks, first, end, export.cut.layout.num_layers))
            case Halted(_, known, num_computed):
                num_pieces = export.cut.pieces_before(-(-num_computed // export.cut.layout.block_size))
                export.feed(SequenceMoved(known, num_computed, num_pieces))
                export.timer = asyncio.get_running_loop().call_later(self._max_pause_s, self._pause_ended, export)
            case ExportEnded(_, reason):
                export.feed(Broken(reason, is_ours=True))

    def _pause_ended(self, export: _RunningExport) -> None:
        export.feed(Broken(f"it has not landed within {self._max_pause_s:g} s", is_ours=True))

    def _release(self, export: _RunningExport, reason: str) -> None:
        del self._running[export.sequence_id]
        if export.timer is not None:
            export.timer.cancel()
        self._counters["migrations_out" if not reason else "migrations_out_failed"] += 1
        self._post(Resume(export.sequence_id) if reason else Depart(export.sequence_id))


class _RunningExport:
    def __init__(self, owner: RunningExporter, sequence_id: int, cut: Cut, feed: Feed) -> None:
        self._owner = owner
        self.sequence_id = sequence_id
        self.cut = cut
        self.feed = feed
        self.may_halt = False
        """The engine has announced all that is final."""
        self.num_fed = 0
        self.is_halting = False
        self.timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        cut = self.cut
        self._owner._post(BeginExport(self.sequence_id, cut.first_block, cut.first_block + cut.num_blocks))

    def acknowledged(self, num_pieces: int) -> None:
        """As Paced.acknowledged: once the receiver has all that is final, the sequence may stand still."""
        if self.may_halt and num_pieces >= self.num_fed and not self.is_halting:
            self.is_halting = True
            self._owner._post(Halt(self.sequence_id))

    def release(self, reason: str) -> None:
        self._owner._release(self, reason)
