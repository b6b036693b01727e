"""One rank's part in epochs: joins them, computes steps in them, leaves them. The same for the leader's own rank and all others."""

from __future__ import annotations

import threading
import time

from workers.config import ParallelConfig
from workers.errors import DeviceStuck, RankLost
from workers.group.messages import Done, Form, Step
from workers.model.decoder.rank import GroupStep, Rank
from workers.model.parallel.collectives import Links
from workers.model.parallel.direct_dispatch import DirectBuffers
from workers.model.parallel.epoch import WorldEpoch
from workers.model.parallel.expert_placement import Placement
from workers.runner import Batch, Sampled

_STUCK_S = 10.0
"""A thread that has not come back this long after its epoch was aborted waits for a device that waits for a lost rank."""


class EpochMember:
    """Owns a rank's epoch. One thread joins and computes; any thread aborts."""

    def __init__(self, runner: Rank, links: Links, host: str, stuck_s: float = _STUCK_S) -> None:
        self._runner, self._links, self._host, self._stuck_s = runner, links, host, stuck_s
        self._has_left = threading.Event()
        self._epoch: WorldEpoch | None = None
        self._aborted: tuple[int, threading.Event] = (0, threading.Event())
        self._lock = threading.Lock()
        self.role, self.generation = "", 0

    @property
    def runner(self) -> Rank:
        return self._runner

    @property
    def epoch(self) -> int:
        """The epoch that this rank is in; 0 between two."""
        epoch = self._epoch
        return 0 if epoch is None else epoch.epoch

    def prepare(self, epoch: int) -> None:
        """Before `join`, in order with `abort`: an abort that comes from now on ends this epoch."""
        with self._lock:
            self._aborted = (epoch, threading.Event())

    def join(self, form: Form, parallel: ParallelConfig) -> None:
        """Meets the other ranks; afterwards this rank holds the leader's placement and role. Raises RankLost,
        or DeviceStuck as `leave`."""
        self.leave()
        epoch, aborted = self._aborted
        if epoch != form.epoch or aborted.is_set():
            raise RankLost(f"epoch {form.epoch} is over")
        if form.slots:
            self._runner.experts.adopt(Placement(parallel.size, tuple(map(tuple, form.slots))))
        self.role, self.generation = form.role, form.generation
        layout = self._runner.layout
        made: list[DirectBuffers | None] = []
        try:
            self._epoch = WorldEpoch.join(
                form.epoch,
                (form.store_host, form.store_port),
                rank=layout.rank,
                size=layout.size,
                tensor=layout.tensor,
                host=self._host,
                timeout_s=parallel.form_timeout_s,
                aborted=aborted,
                device=self._runner.device,
                prepare=lambda store: made.append(self._runner.prepare(form.direct, store)),
            )
        except RankLost:
            self._runner.left()
            raise
        self._runner.use_buffers(made[0])
        self._has_left.clear()
        self._links.use(self._epoch.world, self._epoch.tensor)

    def leave(self) -> None:
        """Out of the epoch; its process groups go. Weights and KV stay. Raises DeviceStuck when the device does not."""
        epoch, self._epoch = self._epoch, None
        self._links.leave()
        if epoch is not None:
            epoch.abort()
            self._runner.left()
        self._has_left.set()

    def abort(self, epoch: int) -> None:
        """Every wait of this rank in that epoch ends with RankLost. For another thread than the one that computes."""
        with self._lock:
            if self._aborted[0] == epoch:
                self._interrupt()

    def abort_any(self) -> None:
        self._interrupt()

    def _interrupt(self) -> None:
        number, event = self._aborted
        event.set()
        epoch = self._epoch  # one that is being joined is ended by its flag alone
        if epoch is not None and epoch.epoch == number:
            epoch.interrupt()
            if self._runner.device != "cpu" or self._runner.is_direct:
                threading.Thread(target=self._require_leave, name="group-stuck", daemon=True).start()

    def _require_leave(self) -> None:
        """Dies where the thread that computes does not come back, and with it the process whose owner watches its threads
        (cluster.actors.process): what the GPU waits for in NVSHMEM's operations cannot be aborted, and NCCL's abort may hang too."""
        if not self._has_left.wait(self._stuck_s):
            raise DeviceStuck("the GPU waits for a rank that is gone, which only the end of this process can end")

    def compute(self, step: Step, batch: Batch) -> tuple[list[Sampled], Done]:
        """Switches role, moves experts, then computes, as the step says. Raises RankLost when the epoch is over."""
        if self._epoch is None or self._epoch.epoch != step.epoch:
            raise RankLost(f"epoch {step.epoch} is over")
        started_s = time.monotonic()
        if (step.role, step.generation) != (self.role, self.generation):
            self.role, self.generation = step.role, step.generation
        if step.moved_layer >= 0:
            self._runner.experts.move(step.moved_layer, tuple(step.moved_slots))
        results = self._runner.execute_part(batch, GroupStep(step.num_prefill, step.num_decode, step.halves))
        sent_bytes = self._epoch.world.num_sent_bytes
        load = self._runner.experts.take_load() if step.wants_load else []
        done = Done(step.epoch, step.number, time.monotonic() - started_s, self.generation, sent_bytes, load)
        return results, done
