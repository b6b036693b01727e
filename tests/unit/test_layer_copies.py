"""Layers leave a device while a step computes: told of in order, only once they are there, and copied once. The device is as slow as it likes."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.kv_memory.memory import KvLayout
from workers.model.cuda.copy_engine import Mark
from workers.model.cuda.device_pool import DevicePool, StagedKvMemory
from workers.model.cuda.layer_copies import StepCopies
from workers.runner import LayerHook

PATIENCE_S = 60.0
Pairs = Sequence[tuple[Tensor, Tensor]]


@dataclass(eq=False)
class Copy:
    """Copies that the device was given at once. As a mark: where they are done."""

    device: SlowDevice
    pairs: Pairs
    after: Computed
    is_done: bool = False

    def wait(self) -> None:
        self.device.wait_for(lambda: self.is_done or self.device.has_failed)
        if not self.is_done:
            raise RuntimeError("a kernel failed")


@dataclass(frozen=True)
class Computed:
    """The mark behind so many kernels."""

    device: SlowDevice
    num_kernels: int

    def wait(self) -> None:
        self.device.wait_for(lambda: self.device.num_run >= self.num_kernels)


@dataclass(eq=False)
class SlowDevice:
    """A CopyEngine on which kernels run, and copies end, only when a test says so."""

    kernels: list[Callable[[], None]] = field(default_factory=list)
    num_run: int = 0
    copies: list[Copy] = field(default_factory=list)
    has_failed: bool = False
    has_pinned_memory: bool = True
    changed: threading.Condition = field(default_factory=threading.Condition)

    def mark(self) -> Computed:
        return Computed(self, len(self.kernels))

    def pinned(self, num_bytes: int) -> Tensor:
        if not self.has_pinned_memory:
            raise RuntimeError("no pinned memory is left")
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def copy(self, pairs: Pairs, after: Mark) -> Copy:
        assert isinstance(after, Computed)
        copy = Copy(self, pairs, after)
        with self.changed:
            self.copies.append(copy)
            self.changed.notify_all()
        return copy

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE_S), "the device was left waiting"

    @property
    def ready(self) -> list[Copy]:
        return [copy for copy in self.copies if not copy.is_done and copy.after.num_kernels <= self.num_run]

    def run_kernel(self) -> None:
        self.kernels[self.num_run]()
        self.num_run += 1

    def end(self, copy: Copy) -> None:
        for target, source in copy.pairs:
            target.copy_(source)
        with self.changed:
            copy.is_done = True
            self.changed.notify_all()

    def fail(self) -> None:
        """What has not run never will."""
        with self.changed:
            self.has_failed = True
            self.changed.notify_all()


class Step:
    """A step of a model without a model: its kernels write random keys and values, layer by layer, to some blocks."""

    def __init__(self, num_layers: int, blocks: Sequence[int], every: int, slot_layers: int = 0) -> None:
        self.layout = KvLayout(8, num_layers, 1, 64, 2, "float32", 4)
        self.device = SlowDevice()
        self.pool = DevicePool(self.layout, torch.device("cpu"))
        self.memory = StagedKvMemory(self.pool, self.device)
        if slot_layers:
            self.memory._layers._slot_bytes = max(slot_layers * self.layout.layer_bytes, self.layout.block_bytes)
        self.final = torch.randn(self.pool.values.shape)
        self.blocks = tuple(blocks)
        self.heard: list[int] = []
        self.faults: list[str] = []
        copies = self.memory.follow(LayerHook(every, self.hear, self.blocks))
        assert copies is not None
        self.copies: StepCopies = copies

    def hear(self, num_layers: int) -> None:
        """On the thread that copies, whose exceptions nobody would see."""
        self.heard.append(num_layers)
        for block in self.blocks:
            if self.on_host(block, num_layers) != self.on_device(block, num_layers):
                self.faults.append(f"{num_layers} layers of block {block} are not there")

    def on_host(self, block: int, num_layers: int) -> bytes:
        return self.memory.block(block, 0, num_layers).tobytes()

    def on_device(self, block: int, num_layers: int) -> bytes:
        """What it will hold in the end."""
        return self.final[block, :num_layers].numpy().tobytes()

    def launch_layer(self) -> None:
        layer = len(self.device.kernels)

        def kernel() -> None:
            self.pool.values[list(self.blocks), layer] = self.final[list(self.blocks), layer]

        self.device.kernels.append(kernel)
        self.copies.filled(layer + 1)

    def run(self, choose: Callable[[list[Callable[[], None]]], Callable[[], None]], fails_at: int = 1000) -> None:
        """Has the device do all there is to do, in the order of `choose`; kernel number `fails_at` fails."""
        num_layers, num_bytes = self.layout.num_layers, len(self.blocks) * self.layout.layer_bytes
        device = self.device
        while True:
            moves: list[Callable[[], None]] = [lambda copy=copy: device.end(copy) for copy in device.ready]
            if len(device.kernels) < num_layers:
                moves.append(self.launch_layer)
            if device.num_run == fails_at:
                if not moves and self.num_copied_bytes >= self.num_marked(fails_at) * num_bytes:
                    device.fail()
                    return
            elif device.num_run < len(device.kernels):
                moves.append(device.run_kernel)
            if moves:
                choose(moves)()
            elif self.num_copied_bytes == num_layers * num_bytes:
                return
            else:
                device.wait_for(lambda: bool(device.ready))

    def num_marked(self, num_layers: int) -> int:
        """Layers in groups that are whole after so many."""
        return num_layers - num_layers % self.copies._hook.every

    @property
    def num_copied_bytes(self) -> int:
        return sum(target.numel() for copy in self.device.copies if copy.is_done for target, _ in copy.pairs)


SHAPES = st.tuples(
    st.integers(2, 7), st.lists(st.integers(0, 7), min_size=1, max_size=6, unique=True), st.integers(1, 6),
    st.sampled_from([0, 7, 13]),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 1 << 30))
def test_layers_are_told_of_in_order_and_not_before_all_their_bytes_are_on_the_host(
    shape: tuple[int, list[int], int, int], seed: int
) -> None:
    num_layers, blocks, every, slot_layers = shape
    step = Step(num_layers, blocks, every, slot_layers)
    step.run(random.Random(seed).choice)
    step.memory.followed(step.copies)
    assert not step.faults and step.heard == list(range(every, num_layers, every))
    copied = Counter(source.data_ptr() for copy in step.device.copies for _, source in copy.pairs)
    assert set(copied.values()) == {1} and step.num_copied_bytes == len(blocks) * step.layout.block_bytes
    # What the plain way would bring to the host is there, and the plain way brings it no second time.
    expected = [step.on_device(block, num_layers) for block in blocks]
    step.pool.values.zero_()
    step.memory.expose(blocks)
    assert [step.on_host(block, num_layers) for block in blocks] == expected
    others = set(range(step.layout.num_blocks)) - set(blocks)
    assert not any(any(step.on_host(block, num_layers)) for block in others)
    step.memory.close()


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 6), st.integers(0, 1 << 30))
def test_a_step_that_fails_tells_of_no_layer_behind_the_fault_and_its_blocks_are_not_taken_as_copied(
    shape: tuple[int, list[int], int, int], fails_at: int, seed: int
) -> None:
    num_layers, blocks, every, slot_layers = shape
    fails_at %= num_layers
    step = Step(num_layers, blocks, every, slot_layers)
    step.run(random.Random(seed).choice, fails_at)
    step.copies.abandon()
    whole = list(range(every, fails_at + 1, every))
    assert not step.faults and step.heard == whole[: len(step.heard)]
    step.pool.values.copy_(step.final)
    step.memory.expose(blocks)
    assert [step.on_host(b, num_layers) for b in blocks] == [step.on_device(b, num_layers) for b in blocks]
    step.memory.close()


def launched(num_layers: int = 4) -> Step:
    """A step whose kernels have run, and whose first copy is under way."""
    step = Step(num_layers, [1, 2], every=1)
    for _ in range(num_layers):
        step.launch_layer()
        step.device.run_kernel()
    step.device.wait_for(lambda: bool(step.device.ready))
    return step


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_abandoned_step_lets_its_copies_end_and_shows_nothing_of_them() -> None:
    step = launched()
    copies_at_return: list[bool] = []

    def abandon() -> None:
        step.copies.abandon()
        copies_at_return.extend(copy.is_done for copy in step.device.copies)

    abandoning = threading.Thread(target=abandon)
    abandoning.start()
    until(lambda: step.copies._is_over)
    while abandoning.is_alive():
        for copy in step.device.ready:
            step.device.end(copy)
        abandoning.join(0.001)
    assert copies_at_return and all(copies_at_return)
    assert not step.heard and not step.memory.bytes.any()
    step.memory.close()


def test_blocks_are_copied_again_once_anything_may_have_changed_them() -> None:
    for change in (
        lambda memory: memory.follow(None),
        lambda memory: memory.adopt([1, 2]),
        lambda memory: memory.copy_in([1, 2], [memory.block(block, 0, 4) for block in (1, 2)]),
    ):
        step = Step(4, [1, 2], every=2)
        step.run(lambda moves: moves[0])
        step.memory.followed(step.copies)
        change(step.memory)
        step.pool.values.fill_(7)
        step.memory.expose([1])
        assert step.on_host(1, 4) == step.pool.values[1].numpy().tobytes()
        step.memory.close()


def test_without_pinned_memory_nothing_is_told_and_blocks_are_copied_after_the_step() -> None:
    step = Step(4, [1, 2], every=1)
    step.device.has_pinned_memory = False
    for _ in range(4):
        step.launch_layer()
        step.device.run_kernel()
    step.memory.followed(step.copies)
    assert not step.heard and not step.memory.bytes.any()
    step.memory.expose([1, 2])
    assert step.on_host(1, 4) == step.on_device(1, 4) and step.on_host(2, 4) == step.on_device(2, 4)
    step.memory.close()


def test_a_hook_that_raises_ends_neither_the_thread_nor_the_step() -> None:
    pool = DevicePool(KvLayout(8, 3, 1, 64, 2, "float32", 4), torch.device("cpu"))
    pool.values.normal_()
    memory = StagedKvMemory(pool)

    def breaks(num_layers: int) -> None:
        raise ValueError(num_layers)

    heard: list[int] = []
    for call in (breaks, heard.append):
        copies = memory.follow(LayerHook(1, call, (3, 4)))
        assert copies is not None
        for layer in range(3):
            copies.filled(layer + 1)
        memory.followed(copies)
    assert heard == [1, 2]
    memory.close()


def copiers() -> list[threading.Thread]:
    gc.collect()
    return [thread for thread in threading.enumerate() if thread.name == "kv-layers"]


def test_closing_ends_the_thread_and_whoever_waits_for_it() -> None:
    before = len(copiers())
    step = launched()
    assert len(copiers()) == before + 1
    closing = threading.Thread(target=step.memory.close)
    closing.start()
    until(lambda: step.memory._layers._is_closed)
    while closing.is_alive():
        for copy in step.device.ready:
            step.device.end(copy)
        closing.join(0.001)
    assert len(copiers()) == before
    assert len(step.device.copies) <= 3  # what waited for a slot was not begun
    heard = list(step.heard)
    assert step.copies.finish() == ()
    late = step.memory.follow(LayerHook(1, step.hear, (3,)))
    assert late is not None
    late.filled(1)
    late.abandon()
    step.memory.close()
    assert step.heard == heard and len(copiers()) == before


class Listener:
    def hear(self, num_layers: int) -> None:
        """Takes note."""


def test_an_idle_thread_keeps_no_listener_and_goes_with_the_pool_that_nobody_uses_any_more() -> None:
    before = len(copiers())
    memory = StagedKvMemory(DevicePool(KvLayout(8, 3, 1, 64, 2, "float32", 4), torch.device("cpu")))
    listener = Listener()
    gone = weakref.ref(listener)
    copies = memory.follow(LayerHook(1, listener.hear, (3, 4)))
    assert copies is not None
    for layer in range(3):
        copies.filled(layer + 1)
    memory.followed(copies)
    assert len(copiers()) == before + 1
    del copies, listener
    until(lambda: gc.collect() >= 0 and gone() is None)
    del memory
    until(lambda: len(copiers()) == before)
