"""The leader's end of a group: keeps the connections of its ranks, forms epochs and passes steps out and results in.

It runs in the process of rank 0 and knows no model: what rank 0 itself must do comes to it as callbacks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from workers.config import ParallelConfig
from workers.errors import RankLost
from workers.group import formation as f
from workers.group.channel import Channel
from workers.group.entrance import Entrance, tell
from workers.group.messages import (
    Abort,
    Beat,
    Blocks,
    Declined,
    Done,
    Failed,
    Form,
    Formed,
    GetBlocks,
    Hello,
    Message,
    PutBlocks,
    Ready,
    Step,
    Stop,
    Welcome,
)  # fmt: skip
from workers.kv_memory.memory import SharedHandle

log = logging.getLogger(__name__)

BEATS_PER_TIMEOUT = 4
OWN_RANK = 0


@dataclass(frozen=True, slots=True)
class Truth:
    """What a rank that joins now must hold: the leader's word on placement and role."""

    slots: list[list[int]]
    role: str
    generation: int


@dataclass(frozen=True, slots=True)
class Callbacks:
    """How the leader speaks to its process. None of them may wait for the leader.

    `form` and `abort` concern rank 0's own part; `lost` is for whoever replaces ranks.
    """

    truth: Callable[[], Truth]
    form: Callable[[Form], None]
    abort: Callable[[int], None]
    lost: Callable[[int, str], None]


class GroupLeader:
    """Ranks 1 .. size-1 over TCP. Threads: one accepts, one per rank receives, one beats."""

    def __init__(
        self, parallel: ParallelConfig, callbacks: Callbacks, *, num_blocks: int, store: tuple[str, int], token: str
    ) -> None:
        self._parallel, self._callbacks = parallel, callbacks
        self._num_blocks, self._store = num_blocks, store
        self._entrance = Entrance(parallel, token, self._serve_rank)
        self._formation = f.Formation(
            parallel.size, parallel.tensor_parallel, parallel.form_timeout_s, parallel.step_timeout_s
        )
        self._formation.members.add(OWN_RANK)
        self._changed = threading.Condition(threading.RLock())
        self._channels: dict[int, Channel] = {}
        self._done: dict[int, Done] = {}
        self._num_asked = 0
        self._asked: dict[int, int] = {}
        """Questions that wait for an answer, by number, and the ranks they were put to."""
        self._blocks: dict[int, Blocks] = {}
        """Their answers."""
        self._hellos: dict[int, Hello] = {}
        self._remote: set[int] = set()
        self._direct: set[int] = set()
        """Ranks that offer to bring rows to experts without the host in the next epoch."""
        self.pool: SharedHandle | None = None
        """The memory that ranks on this host join."""
        self._number = 0
        self._fault = ""
        self._own: Ready | None = None
        self._ready: dict[int, Ready] = {}
        """What each rank that is connected said last."""
        self._is_stopped = threading.Event()

    # ---- life ----

    def start(self, host: str, port: int = 0) -> tuple[str, int]:
        """Listens for ranks; returns the address. Raises InvalidConfig when it is taken."""
        address = self._entrance.open(host, port)
        threading.Thread(target=self._beat, name="group-beat", daemon=True).start()
        return address

    def stop(self) -> None:
        """Tells every rank to end."""
        self._is_stopped.set()
        self._entrance.close()
        with self._changed:
            channels = dict(self._channels)
            self._changed.notify_all()
        for channel in channels.values():
            tell(channel, Stop())
            channel.close()

    # ---- what rank 0 reports of itself ----

    def own_ready(self, fingerprint: str, offers_direct: bool = False, kernels: str = "") -> None:
        """Ranks that have loaded something else meanwhile are declined now."""
        with self._changed:
            self._own = Ready(fingerprint, kernels=kernels)
            (self._direct.add if offers_direct else self._direct.discard)(OWN_RANK)
            for rank, ready in list(self._ready.items()):
                if reason := _unlike(self._own, ready):
                    self._decline(rank, reason)
                    self._handle(f.Gone(rank, reason))
            self._handle(f.BecameReady(OWN_RANK))

    def own_formed(self, epoch: int) -> None:
        self._handle(f.HasFormed(OWN_RANK, epoch))

    def own_broke(self, epoch: int, message: str) -> None:
        self._handle(f.Broke(OWN_RANK, epoch, message))

    # ---- steps ----

    @property
    def epoch(self) -> int:
        return self._formation.epoch

    @property
    def is_serving(self) -> bool:
        return self._formation.state is f.State.SERVING

    def wait_serving(self, timeout_s: float) -> bool:
        """Whether an epoch is formed within that time."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_serving or self._is_stopped.is_set(), timeout_s)
            return self.is_serving

    def members(self) -> dict[int, Hello]:
        """The other ranks that are connected now, as they introduced themselves."""
        with self._changed:
            return {rank: self._hellos[rank] for rank in self._channels}

    def last_seen(self, rank: int) -> Hello | None:
        """Who held this rank last."""
        return self._hellos.get(rank)

    @property
    def remote_ranks(self) -> tuple[int, ...]:
        """Ranks that keep their KV in a memory of their own, on another host."""
        with self._changed:
            return tuple(sorted(self._remote))

    def ask(self, rank: int, message: GetBlocks | PutBlocks, epoch: int | None = None) -> Blocks:
        """A rank's answer, between two steps of `epoch` (None: of whichever serves). Raises RankLost when that is over.

        A rank that does not answer is lost, so that it moves nothing once the blocks have another owner.
        """
        with self._changed:
            epoch = self.epoch if epoch is None else epoch
            if not self._lives(epoch):
                raise RankLost("the group is between two epochs")
            channel = self._channels[rank]
            self._num_asked += 1
            number = self._num_asked
            self._asked[number] = rank
        limit_s = self._parallel.step_timeout_s
        try:
            channel.send(replace(message, epoch=epoch, number=number))
            with self._changed:
                self._changed.wait_for(lambda: number in self._blocks or not self._lives(epoch), limit_s)
                if not self._lives(epoch):
                    raise RankLost("the epoch ended before a rank had moved its blocks")
                if number in self._blocks:
                    return self._blocks[number]
        finally:
            with self._changed:
                del self._asked[number]
                self._blocks.pop(number, None)
        channel.close()
        raise RankLost(f"rank {rank} did not move its blocks within {limit_s:g} s")

    def take_lost_pools(self) -> tuple[int, ...]:
        """Pools whose KV is gone since the last call."""
        with self._changed:
            return self._formation.take_lost_pools()

    def take_fault(self) -> str:
        """Why a rank's part of a step failed by itself, since the last call; empty if none did."""
        with self._changed:
            fault, self._fault = self._fault, ""
            return fault

    def begin(self, steps: dict[int, Step]) -> None:
        """Sends each rank its part of a step. Raises RankLost when the epoch is over."""
        with self._changed:
            number, epoch = next((step.number, step.epoch) for step in steps.values())
            if not self.is_serving or epoch != self.epoch:
                raise RankLost("the group is between two epochs")
            self._done, self._number = {}, number
            self._handle(f.StepBegan(number))
            channels = {rank: self._channels[rank] for rank in steps if rank != OWN_RANK}
        for rank, channel in channels.items():
            try:
                channel.send(steps[rank])
            except RankLost as error:
                self._handle(f.Gone(rank, str(error)))
                raise

    def collect(self, epoch: int) -> dict[int, Done]:
        """What the other ranks answered to the step, once all have. Raises RankLost when the epoch ends before."""
        self._handle(f.StepEnded(OWN_RANK, self._number))
        with self._changed:
            self._changed.wait_for(lambda: len(self._done) == self._parallel.size - 1 or not self._lives(epoch))
            if len(self._done) < self._parallel.size - 1:
                raise RankLost("a rank was lost in mid-step")
            return dict(self._done)

    def _lives(self, epoch: int) -> bool:
        return self.is_serving and self.epoch == epoch and not self._is_stopped.is_set()

    # ---- threads ----

    def _serve_rank(self, hello: Hello, channel: Channel) -> None:
        """One rank, from its Hello to its end."""
        rank = hello.rank
        with self._changed:
            self._ready.pop(rank, None)
            before = self._channels.pop(rank, None)
            self._handle(f.Joined(rank))
            self._channels[rank] = channel
            self._hellos[rank] = hello
        if before is not None:
            before.close()
        tell(channel, self._welcome())
        try:
            while True:
                self._hear(rank, channel.receive())
        except RankLost as error:
            channel.close()
            with self._changed:
                if self._channels.get(rank) is not channel:
                    return  # another process has taken this rank's place
                del self._channels[rank]
                self._ready.pop(rank, None)
                if not self._is_stopped.is_set():
                    self._handle(f.Gone(rank, str(error)))

    def _decline(self, rank: int, reason: str) -> None:
        """Ends a connection whose rank cannot serve here."""
        log.warning("rank %d was declined: %s", rank, reason)
        tell(self._channels[rank], Declined(reason))
        self._channels[rank].close()

    def _welcome(self) -> Welcome:
        pool = self.pool or SharedHandle(0, -1, 0, b"")
        slots = self._callbacks.truth().slots
        return Welcome(self._num_blocks, slots, pool.pid, pool.fd, pool.num_bytes, pool.nonce.hex())

    def _hear(self, rank: int, message: Message) -> None:
        match message:
            case Ready():
                with self._changed:
                    if self._own is not None and (reason := _unlike(self._own, message)):
                        self._decline(rank, reason)
                        raise RankLost(reason)
                    self._ready[rank] = message
                    (self._remote.discard if message.shares_memory else self._remote.add)(rank)
                    (self._direct.add if message.offers_direct else self._direct.discard)(rank)
                self._handle(f.BecameReady(rank))
            case Blocks():
                with self._changed:
                    if self._asked.get(message.number) == rank:
                        self._blocks[message.number] = message
                        self._changed.notify_all()
            case Formed():
                self._handle(f.HasFormed(rank, message.epoch))
            case Done():
                with self._changed:
                    if message.number == self._number and message.epoch == self.epoch:
                        self._done[rank] = message
                        self._changed.notify_all()
                self._handle(f.StepEnded(rank, message.number))
            case Failed():
                with self._changed:
                    if not message.is_broken and message.epoch == self.epoch:
                        self._fault = f"rank {rank}: {message.message}"
                self._handle(f.Broke(rank, message.epoch, f"rank {rank}: {message.message}"))
            case _:
                pass

    def _beat(self) -> None:
        interval_s = self._parallel.heartbeat_timeout_s / BEATS_PER_TIMEOUT
        while not self._is_stopped.wait(interval_s):
            with self._changed:
                channels = list(self._channels.values())
            for channel in channels:
                tell(channel, Beat())
            self._handle(f.Tick())

    def _handle(self, event: f.Event) -> None:
        with self._changed:
            for command in self._formation.handle(event, time.monotonic()):
                self._execute(command)
            self._changed.notify_all()

    def _execute(self, command: f.Command) -> None:
        match command:
            case f.FormEpoch(epoch):
                truth = self._callbacks.truth()
                direct = len(self._direct) == self._parallel.size
                form = Form(epoch, *self._store, truth.slots, truth.role, truth.generation, direct)
                self._tell_all(form)
                self._callbacks.form(form)
            case f.AbortEpoch(epoch, message):
                log.warning("epoch %d of the group is over: %s", epoch, message)
                self._tell_all(Abort(epoch, message))
                self._callbacks.abort(epoch)
            case f.Serve(epoch):
                log.info("epoch %d: %d ranks serve", epoch, self._parallel.size)
            case f.ReportLost(rank, reason):
                log.warning("rank %d is lost: %s", rank, reason)
                self._callbacks.lost(rank, reason)
            case f.Expel(rank, reason):
                log.warning("rank %d is expelled: %s", rank, reason)
                self._channels[rank].close()

    def _tell_all(self, message: Message) -> None:
        for channel in list(self._channels.values()):
            tell(channel, message)


def _unlike(own: Ready, other: Ready) -> str:
    """Why a rank cannot be in one group with the leader; empty if it can."""
    if other.fingerprint == own.fingerprint:
        return ""
    if other.kernels != own.kernels:
        return (
            f"it computes with {other.kernels}, and the leader with {own.kernels}: all ranks need the same kernels; give every "
            "host a compiler, or set worker.native to false for all"
        )
    return "it has loaded another checkpoint, or with other settings"
