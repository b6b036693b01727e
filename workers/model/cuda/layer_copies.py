"""Brings the layers that a step fills to the pool's mirror while the step still computes, and tells; knows no model and no handoff.

The thread that launches a step marks where each group of layers ends. One thread beside it has the device copy what lies before
a mark into pinned memory, moves it to the mirror, and calls the step's LayerHook. The mirror itself is not pinned: that
would take real memory for the whole pool, where it takes some for what was transferred.
Shapes: N blocks, L layers, X bytes of a layer of a block.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from workers.model.cuda.copy_engine import CopyEngine, Mark
from workers.runner import LayerHook

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

SLOT_BYTES = 16 << 20
_NUM_SLOTS = 2
"""Pinned memory: the device fills one part while the other is moved to the mirror."""
MAX_GROUPS = 256
"""Groups that wait for the thread; beyond that a launch waits. Two steps of 64 layers, each a group of its own, are 128."""
CLOSE_S = 10.0


class StepCopies:
    """What becomes of the blocks of one step's hook. All but what begins with an underscore is for the thread that launches."""

    def __init__(self, owner: LayerCopies, hook: LayerHook, num_layers: int) -> None:
        self._owner = owner
        self._hook = hook
        self._num_layers = num_layers
        self._num_marked = self._num_copied = 0
        """Layers."""
        self._changed = threading.Condition()
        self._num_open = 0
        """Groups whose copies are under way or to come."""
        self._is_over = False

    def filled(self, num_layers: int) -> None:
        """The kernels that write keys and values of the first so many layers have been launched."""
        if num_layers % self._hook.every and num_layers < self._num_layers:
            return
        group = _Group(self, self._num_marked, num_layers, self._owner.engine.mark())
        self._num_marked = num_layers
        with self._changed:
            self._num_open += 1
        if not self._owner._take(group):
            self._give_up()
            self._close_group()

    def finish(self) -> tuple[int, ...]:
        """Waits for the copies of a step that was launched to its end, as long as the device takes.

        Everything has been told then. Returns the blocks that the mirror now has; none where copies failed.
        """
        self._wait()
        return self._hook.blocks if self._num_copied == self._num_layers else ()

    def abandon(self) -> None:
        """The step failed: nothing more is told, and on return nothing writes to the mirror any more."""
        self._give_up()
        self._wait()

    def _wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._num_open)

    def _give_up(self) -> None:
        with self._changed:
            self._is_over = True

    def _landed(self, end: int) -> None:
        self._num_copied = end
        if end < self._num_layers:  # the last ones are told of with the step's results
            self._hook.call(end)

    def _close_group(self) -> None:
        with self._changed:
            self._num_open -= 1
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers first .. end-1 of a step's blocks; `mark` is behind the kernels that write them."""

    step: StepCopies
    first: int
    end: int
    mark: Mark


@dataclass(frozen=True, slots=True)
class _Portion:
    """As many blocks of a group as a slot holds, on their way; `done` is where the slot has them."""

    group: _Group
    homes: list[Bytes]
    staged: list[Bytes]
    done: Mark
    is_last: bool


class LayerCopies:
    """The thread, which starts with the first hook. It holds views of both pools, but not their owner.

    `device` uint8 [N, L, X] is what the model writes, `host` uint8 [N, L, X] the mirror.
    """

    def __init__(self, device: Tensor, host: Bytes, engine: CopyEngine, slot_bytes: int = SLOT_BYTES) -> None:
        self.engine = engine
        self._device = device
        self._host = host
        self._slot_bytes = max(slot_bytes, device[0].numel())
        self._slots: list[Tensor] = []
        self._next_slot = 0
        self._groups: queue.Queue[_Group | None] = queue.Queue(MAX_GROUPS)
        self._pending: deque[_Portion] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def follow(self, hook: LayerHook) -> StepCopies:
        """For a step that is about to be launched; then `filled` for its layers in order, and `finish` or `abandon`."""
        return StepCopies(self, hook, self._host.shape[1])

    def close(self) -> None:
        """Ends the thread after the copies under way; steps that are not done are told of no more. Safe to call twice."""
        with self._lock:
            self._is_closed = True
            thread, self._thread = self._thread, None
            if thread is not None:
                self._groups.put(None)
        # The last user of a hook may be this very thread, and so the one that lets the pool go.
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_S)
            if thread.is_alive():
                log.error("the thread that copies layers did not end within %s s", CLOSE_S)

    def _take(self, group: _Group) -> bool:
        """False once it is closed."""
        with self._lock:
            if self._is_closed:
                return False
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kv-layers", daemon=True)
                self._thread.start()
            self._groups.put(group)
            return True

    # ---- the thread ----

    def _run(self) -> None:
        while True:
            try:
                group = self._groups.get(block=not self._pending)
            except queue.Empty:
                self._retire()
                continue
            if group is None:
                break
            if self._is_closed:
                group.step._give_up()
            self._begin(group)
            del group  # or an idle thread would keep the last step's hook, and whatever that knows
        while self._pending:
            self._pending[0].group.step._give_up()
            self._retire()

    def _begin(self, group: _Group) -> None:
        """Has the device copy a group, as far as there are slots at once."""
        try:
            if not group.step._is_over:
                for portion in self._portions(group):
                    self._pending.append(portion)
                return
        except Exception as error:  # no pinned memory is left, mostly
            _give_up(group.step, error)
        group.step._close_group()

    def _portions(self, group: _Group) -> Iterator[_Portion]:
        blocks = group.step._hook.blocks
        num_bytes = (group.end - group.first) * self._host.shape[2]
        size = self._slot_bytes // num_bytes
        for first in range(0, len(blocks), size):
            while len(self._pending) >= _NUM_SLOTS:
                self._retire()
            some = blocks[first : first + size]
            slot = self._slot()[: len(some) * num_bytes].view(len(some), num_bytes)
            sources = [self._device[block, group.first : group.end].reshape(-1) for block in some]
            done = self.engine.copy(list(zip(slot, sources, strict=True)), group.mark)
            homes = [self._host[block, group.first : group.end].reshape(-1) for block in some]
            yield _Portion(group, homes, list(slot.numpy()), done, first + size >= len(blocks))

    def _slot(self) -> Tensor:
        """The one that has been free for longest."""
        if len(self._slots) < _NUM_SLOTS:
            self._slots.append(self.engine.pinned(self._slot_bytes))
        slot = self._slots[self._next_slot]
        self._next_slot = (self._next_slot + 1) % _NUM_SLOTS
        return slot

    def _retire(self) -> None:
        """Moves the oldest portion to the mirror once the device is done with it."""
        portion = self._pending.popleft()
        step = portion.group.step
        try:
            portion.done.wait()
            if not step._is_over:
                for home, staged in zip(portion.homes, portion.staged, strict=True):
                    np.copyto(home, staged)  # without the interpreter's lock
                if portion.is_last:
                    step._landed(portion.group.end)
        except Exception as error:
            _give_up(step, error)
        if portion.is_last:
            step._close_group()


def _give_up(step: StepCopies, error: Exception) -> None:
    """Its blocks are copied after the step instead, if that succeeds."""
    log.warning("layers could not be copied while their step runs: %s", error)
    step._give_up()
