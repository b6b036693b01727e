"""What the router knows of one worker: where it is, whether its stream is up, what it last said of itself, and what was sent there since."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from router.fleet.worker_table import ANYTHING, NOTHING, WorkerTable
from workers.request import Output
from workers.status import NUM_COUNTS, Load, Role, WorkerAddress, WorkerStatus, starts_of
from workers.wire.attach import WorkerFrame


@dataclass(frozen=True, slots=True)
class Charge:
    """The load that one request adds to one worker; `sent_s` is when it was sent."""

    sent_s: float
    num_sequences: int = 0
    num_blocks: int = 0
    prefill_tokens: int = 0


class OptimisticLoad:
    """The open charges of one worker, oldest first, with their sums.

    Prompts are owed for longer than a report takes to contain them: until the first token has come.
    """

    def __init__(self, settle_s: float) -> None:
        """A load report that arrives `settle_s` after a request was sent is taken to contain it."""
        self._settle_s = settle_s
        self.open: dict[str, Charge] = {}
        """By attempt what the worker's reports may not contain yet."""
        self.num_sequences = 0
        self.num_blocks = 0
        self.prefill_tokens = 0
        self._owed: dict[str, int] = {}
        self.owed_tokens = 0
        """Prompt tokens of requests that were sent there to be computed, and that have no token yet."""

    def __len__(self) -> int:
        return len(self.open) + len(self._owed)

    def add(self, wire_id: str, charge: Charge) -> None:
        self.release(wire_id)
        self.open[wire_id] = charge
        self.num_sequences += charge.num_sequences
        self.num_blocks += charge.num_blocks
        self.prefill_tokens += charge.prefill_tokens
        if charge.prefill_tokens:
            self._owed[wire_id] = charge.prefill_tokens
            self.owed_tokens += charge.prefill_tokens

    def release(self, wire_id: str) -> None:
        """The request ended, or its outputs show that the worker knows it."""
        self._settle(wire_id)
        self.owed_tokens -= self._owed.pop(wire_id, 0)

    def _settle(self, wire_id: str) -> None:
        charge = self.open.pop(wire_id, None)
        if charge is not None:
            self.num_sequences -= charge.num_sequences
            self.num_blocks -= charge.num_blocks
            self.prefill_tokens -= charge.prefill_tokens

    def settle(self, now: float) -> bool:
        """A load report arrived. True: it contains what was charged until now."""
        has_settled = False
        while self.open:
            wire_id, oldest = next(iter(self.open.items()))
            if now - oldest.sent_s < self._settle_s:
                break
            self._settle(wire_id)
            has_settled = True
        return has_settled

    def clear(self) -> None:
        for wire_id in [*self.open, *self._owed]:
            self.release(wire_id)


PRESSURE_S = 3.0
"""Counters of preemptions come about once a second: so long a rise counts as pressure."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """What may wait at one worker beyond what it can run: requests that decode there, and prompt tokens to be computed there.

    Enough that a worker finds its next work without asking, and no more, for what waits there cannot go elsewhere.
    """

    num_requests: int
    prompt_tokens: int


@dataclass(slots=True)
class WorkerEntry:
    """One worker. `connection` is the number of the open (or opening) stream; None: there is none, try at `retry_at_s`.

    What changes here is written to its row of the table at once.
    """

    address: WorkerAddress
    charges: OptimisticLoad
    table: WorkerTable
    row: int
    backlog: Backlog
    attempts: dict[str, None] = field(default_factory=dict)
    """Names on the wire of what this router runs there, or moves there, oldest first."""
    is_member: bool = True
    connection: int | None = None
    is_up: bool = False
    """The open stream has brought a status."""
    is_expected: bool = True
    """Serves the model that this router serves."""
    status: WorkerStatus | None = None
    generation: int = 0
    load: Load = field(default_factory=Load)
    last_frame_s: float = 0.0
    """When the last frame arrived, or the stream was opened."""
    heard_awake_s: float = 0.0
    """The same on the fleet's clock that stands still while the router does."""
    retry_at_s: float = 0.0
    num_failures: int = 0
    """Connections in a row that ended before a first status."""
    num_preemptions: float | None = None
    """As the open stream reported last."""
    kind: int | None = None
    """As the table says (router.forecast.steps); None: no status has come since the worker did."""
    pressed_until_s: float = 0.0
    """It has just preempted sequences; until then that counts as pressure."""
    _status_now: WorkerStatus | None = None
    _took: tuple[int, bool] = (NOTHING, False)
    """What the table says that it takes."""
    _shown: tuple[bool, bool, bool] = (False, False, False)
    """What the table's counts contain of it."""

    @property
    def worker_id(self) -> str:
        return self.address.worker_id

    @property
    def role(self) -> Role | None:
        return self.status.role if self.status is not None else None

    @property
    def takes_requests(self) -> bool:
        """A member whose stream is up, that serves the router's model, is whole and does not drain."""
        is_rebuilding = self.status is not None and self.status.is_rebuilding
        return self.is_up and self.is_member and self.is_expected and not self.is_draining and not is_rebuilding

    @property
    def is_draining(self) -> bool:
        return self.status is not None and self.status.is_draining

    @property
    def must_move_decodes(self) -> bool:
        """What decodes there is to go on elsewhere: it drains, leaves, or has another role by now."""
        return self.is_up and self.is_expected and self.status is not None and not self.can_decode

    @property
    def can_decode(self) -> bool:
        return self.takes_requests and self.status is not None and self.status.role.can_decode

    @property
    def can_prefill(self) -> bool:
        return self.takes_requests and self.status is not None and self.status.role.can_prefill

    def current_address(self) -> WorkerAddress:
        """Where peers find the worker, in the generation that it reported last."""
        return WorkerAddress(self.address.worker_id, self.generation, self.address.target)

    def status_now(self) -> WorkerStatus | None:
        """The worker's last status with its last load."""
        if self.status is not None and (self._status_now is None or self._status_now.load is not self.load):
            self._status_now = replace(self.status, load=self.load)
        return self._status_now

    def fault_of(self, frame: WorkerFrame) -> str | None:
        """Why a frame cannot come from the worker that this stream was opened to; None: it can."""
        if frame.generation != self.generation or not self.is_up:
            starts = starts_of(frame.generation)
            if starts < starts_of(self.address.generation):
                return "stale_process"
            if self.is_up and starts != starts_of(self.generation):
                return "restarted"
        if frame.status is not None:
            if frame.status.worker_id != self.worker_id:
                return "impostor"
            if self.is_up and self.status is not None and frame.status.pid != self.status.pid:
                return "restarted"
        status = frame.status or self.status
        if frame.outputs and status is not None and not _are_tokens(frame.outputs, status.model.vocab_size):
            return "impossible_tokens"
        return None

    def update(self, frame: WorkerFrame, now: float) -> None:
        """Takes over generation, status and load."""
        self.last_frame_s = now
        self.generation = frame.generation
        load = frame.load
        if frame.status is not None:
            self.status, self._status_now = frame.status, None
            self.is_up = True
            self.num_failures = 0
            load = load or frame.status.load
            self._watch_preemptions(frame.status, now)
            self.show_roles()
        if load is not None:
            if load.step_s != self.load.step_s and load.step_s > 0:
                self._show_step(load)
            before, self.load = self.load, load
            has_settled = bool(self.charges.open) and self.charges.settle(now)
            if has_settled or load[:NUM_COUNTS] != before[:NUM_COUNTS] or frame.status is not None:
                self.show_load()

    def _show_step(self, load: Load) -> None:
        """Writes to the table how long the worker's last step took, for whoever learns from it."""
        work = load.step_decodes, load.step_context, load.step_prompt_tokens, load.step_prompt_context
        self.table.note_step(self.row, *work, load.step_s)

    def _watch_preemptions(self, status: WorkerStatus, now: float) -> None:
        num_preemptions = next((value for name, value in status.counters if name == "preemptions"), 0.0)
        if self.num_preemptions is not None and num_preemptions > self.num_preemptions:
            self.pressed_until_s = now + PRESSURE_S
        self.num_preemptions = num_preemptions

    def charge(self, wire_id: str, charge: Charge) -> None:
        """Counts what was just sent there."""
        self.charges.add(wire_id, charge)
        self.show_load()

    def release(self, wire_id: str) -> None:
        """The worker's own reports contain it by now, or it has ended."""
        if self.charges:
            self.charges.release(wire_id)
            self.show_load()

    def end_attempt(self, wire_id: str) -> None:
        """It does not decode there any more, or never will."""
        self.attempts.pop(wire_id, None)
        self.charges.release(wire_id)
        self.show_load()

    def close(self, retry_at_s: float) -> None:
        """The stream is gone."""
        self.connection = None
        self.is_up = False
        self.num_failures += 1
        self.retry_at_s = retry_at_s
        self.num_preemptions = None
        self.pressed_until_s = 0.0
        self.attempts.clear()
        self.charges.clear()
        self.show_roles()
        self.show_load()

    def show_roles(self) -> None:
        """Writes to the table what the worker does now."""
        now = self.takes_requests, self.can_decode, self.can_prefill
        if now != self._shown:
            before, self._shown = self._shown, now
            self.table.can_decode[self.row], self.table.can_prefill[self.row] = now[1], now[2]
            self.table.count(now[0] - before[0], now[1] - before[1], now[2] - before[2])
            self.table.has_opened = True

    @property
    def num_others(self) -> int:
        """Routers beside this one that send requests there, or may begin to."""
        return max(0, self.status.num_routers - 1) if self.status is not None else 0

    def show_load(self) -> None:
        """Writes to the table what the worker has reported, what was sent to it since, and what others have probably sent.

        A balancer shares requests out evenly, so when this router has sent several into what the last report showed, each of the
        others has done so too. A single one says nothing of them.
        """
        table, row, load, charges, num_open = self.table, self.row, self.load, self.charges, len(self.charges.open)
        others = self.num_others * (1 - 1 / num_open) if num_open > 1 else 0.0
        num_reported = load.num_running + load.num_waiting + load.num_transferring
        prefill_tokens, num_blocks = charges.prefill_tokens, charges.num_blocks
        if others:
            prefill_tokens += int(others * prefill_tokens)
            num_blocks += int(others * num_blocks)
        table.num_sequences[row] = num_reported + charges.num_sequences + int(others * charges.num_sequences)
        table.prefill_tokens[row] = load.waiting_prefill_tokens + prefill_tokens
        table.free_blocks[row] = load.num_free_blocks - num_blocks
        self._show_room(num_reported, prefill_tokens - charges.prefill_tokens, num_blocks)

    def _show_room(self, num_reported: int, others_tokens: int, num_blocks: int) -> None:
        """Writes to the table what may be sent there now: into room that is known, and a few requests more.

        A report may be older than what was sent, or than outputs that have come since, so of what it counts and what this router
        knows to be there the greater number is believed. An idle worker takes a request whatever it needs. Slots are shared out
        among all routers: each takes it that the others have sent as many requests as itself since the report.
        """
        load, charges, backlog = self.load, self.charges, self.backlog
        num_sent = charges.num_sequences * (1 + self.num_others)
        num_there = max(num_reported, len(self.attempts)) + num_sent - charges.num_sequences
        max_num_seqs = self.status.max_num_seqs if self.status is not None else 0
        if load.num_waiting >= backlog.num_requests or 0 < max_num_seqs <= num_there - backlog.num_requests:
            takes_blocks = NOTHING
        elif load.num_waiting + num_sent < backlog.num_requests:
            takes_blocks = ANYTHING
        else:
            takes_blocks = load.num_free_blocks - num_blocks
        prompt_tokens = max(load.waiting_prefill_tokens, charges.owed_tokens) + others_tokens
        takes_prompt = prompt_tokens < backlog.prompt_tokens
        table, (took_blocks, took_prompt) = self.table, self._took
        self._took = takes_blocks, takes_prompt
        if takes_blocks != took_blocks:
            table.takes_blocks[self.row] = takes_blocks
            table.has_opened = table.has_opened or (takes_blocks > took_blocks and takes_blocks >= table.wanted_blocks)
        if takes_prompt != took_prompt:
            table.takes_prompt[self.row] = takes_prompt
            table.has_opened = table.has_opened or takes_prompt


def _are_tokens(outputs: Iterable[Output], vocab_size: int) -> bool:
    """Whether all that outputs name as tokens are tokens of the vocabulary: they are shown, replayed and looked up as such."""
    for output in outputs:
        for token_id in output.token_ids:
            if not 0 <= token_id < vocab_size:
                return False
        for entry in output.logprobs:
            if not all(0 <= token_id < vocab_size for token_id in (entry.token_id, *(pair[0] for pair in entry.top))):
                return False
        for part in output.prompt_logprobs:
            for ids in (part.token_ids, part.top_ids):
                if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
                    return False
    return True
