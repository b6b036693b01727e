"""Between two steps no more KV is copied than a bite, however long the prompt: what others decode goes on meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from builders import REPORT, generate_alone, make_engine, make_request, run_to_end, step_until, tokens_of

from workers.engine.engine import Engine
from workers.engine.fake_runner import FakeRunner
from workers.engine.messages import StepResult
from workers.errors import RankLost
from workers.kv_memory.memory import BITE_BYTES, KvLayout, KvMemory
from workers.kv_tiers.tiers import KvTiers
from workers.request import Request
from workers.runner import BLOCK_SIZE, Sampled
from workers.scheduler.sequence import Kind

NUM_BLOCKS = 24
LAYOUT = KvLayout(NUM_BLOCKS, 16384, num_kv_heads=1, block_size=BLOCK_SIZE, head_dim=2, dtype="uint8", itemsize=1)
BITE = BITE_BYTES // LAYOUT.block_bytes
assert BITE == 8


class CountedMemory(KvMemory):
    """A pool beside the model's own memory: counts the blocks that are copied between two steps."""

    def __init__(self) -> None:
        super().__init__(LAYOUT)
        self.num_since_step = {"adopt": 0, "expose": 0, "in": 0, "out": 0}
        self.most = dict.fromkeys(self.num_since_step, 0)
        self.is_broken = False

    @property
    def copies(self) -> bool:
        return True

    def count(self, what: str, num_blocks: int) -> None:
        self.num_since_step[what] += num_blocks
        self.most[what] = max(self.most[what], self.num_since_step[what])

    def adopt(self, blocks: Sequence[int]) -> None:
        if self.is_broken:
            raise RankLost("told to")
        self.count("adopt", len(blocks))

    def expose(self, blocks: Sequence[int]) -> None:
        self.count("expose", len(blocks))

    def copy_in(self, blocks: Sequence[int], views: Sequence[npt.NDArray[np.uint8]]) -> None:
        self.count("in", len(blocks))
        super().copy_in(blocks, views)

    def copy_out(self, blocks: Sequence[int], views: Sequence[npt.NDArray[np.uint8]]) -> None:
        self.count("out", len(blocks))
        super().copy_out(blocks, views)


class Bench:
    """An engine over such a pool; `step` begins a new count."""

    def __init__(self, num_host: int = 0) -> None:
        self.memory = CountedMemory()
        tiers = KvTiers(self.memory, num_host) if num_host else None
        self.engine: Engine = make_engine(
            FakeRunner(self.memory), max_model_len=4096, max_batch_tokens=512, tiers=tiers
        )

    def step(self) -> StepResult:
        self.memory.num_since_step = dict.fromkeys(self.memory.num_since_step, 0)
        return self.engine.step()

    def run(self) -> list[StepResult]:
        results = []
        while self.engine.has_work:
            results.append(self.step())
            assert not self.engine.made_no_progress
        return results


OTHER = make_request(range(10, 50), 60)
LONG = make_request([10 + i % 900 for i in range(20 * BLOCK_SIZE - 5)], 3)


def transferring(bench: Bench, request: Request = LONG) -> None:
    bench.engine.add(7, request, Kind.TARGET)
    step_until(bench.engine, "transfers")


def fill(bench: Bench, request: Request) -> None:
    """What a transfer would have placed."""
    live = bench.engine._sequences.lives[7]
    for position, token in enumerate(request.prompt_token_ids):
        block = live.sequence.table.blocks[position // BLOCK_SIZE]
        slots = bench.memory.bytes.view(np.int64).reshape(NUM_BLOCKS, -1)
        slots[block, position % BLOCK_SIZE] = (position << 32) + token + 1


def test_a_prompt_that_lands_is_adopted_in_bites_while_others_decode() -> None:
    bench = Bench()
    bench.engine.add(1, OTHER)
    bench.step()
    transferring(bench)
    fill(bench, LONG)
    first = generate_alone(LONG, num_blocks=64, max_model_len=4096)[0]
    bench.memory.num_since_step = dict.fromkeys(bench.memory.num_since_step, 0)
    bench.engine.incoming.landed(7, Sampled(7, first), 0, REPORT)
    assert bench.engine.take_early() is None and bench.engine.incoming.is_adopting
    results = bench.run()
    said = [[owner for owner, output in result.outputs if output.token_ids] for result in results]
    assert 7 not in said[0] and 1 in said[0]  # the other one decodes while blocks are still to come
    outputs = [entry for result in results for entry in result.outputs]
    assert tokens_of(outputs, 7) == generate_alone(LONG, num_blocks=64, max_model_len=4096)
    assert bench.memory.most["adopt"] == BITE
    assert bench.engine.num_held_blocks == 0


def landing(bench: Bench) -> None:
    transferring(bench)
    fill(bench, LONG)
    bench.engine.incoming.landed(7, Sampled(7, 11), 0, REPORT)


def test_a_sequence_that_is_cancelled_while_it_is_adopted_ends_at_once() -> None:
    bench = Bench()
    landing(bench)
    bench.engine.cancel(7)
    assert bench.engine.num_held_blocks == 0 and not bench.engine.incoming.is_adopting
    assert bench.step().abandoned == []


def test_a_prompt_whose_later_blocks_cannot_be_adopted_is_computed_here() -> None:
    bench = Bench()
    landing(bench)
    bench.memory.is_broken = True
    outputs = [entry for result in bench.run() for entry in result.outputs]
    assert tokens_of(outputs, 7) == generate_alone(LONG, num_blocks=64, max_model_len=4096)


@pytest.mark.parametrize("with_company", [False, True])
def test_a_prefix_comes_up_from_host_memory_and_goes_down_in_bites(with_company: bool) -> None:
    bench = Bench(num_host=40)
    golden = generate_alone(LONG, num_blocks=64, max_model_len=4096)
    bench.engine.add(1, LONG)
    bench.run()
    if with_company:
        bench.engine.add(2, OTHER)
        bench.step()
    bench.engine.add(3, make_request([9] * (19 * BLOCK_SIZE), 1))
    bench.run()  # takes the pool, and so what was cached goes down
    bench.engine.add(4, LONG)
    outputs = [entry for result in bench.run() for entry in result.outputs]
    assert tokens_of(outputs, 4) == golden
    assert dict(bench.engine.counters())["kv_host_hit_blocks"] >= 12
    assert bench.memory.most["in"] <= BITE and 0 < bench.memory.most["out"] <= BITE
    assert bench.engine.num_held_blocks == 0


def test_a_prompt_that_waits_for_blocks_to_go_down_can_be_cancelled_and_the_engine_rests() -> None:
    bench = Bench(num_host=40)
    bench.engine.add(1, LONG)
    bench.run()
    bench.engine.add(2, make_request([9] * (19 * BLOCK_SIZE), 1))
    bench.step()
    assert bench.engine.load().num_waiting == 1
    bench.engine.cancel(2)
    bench.step()
    assert not bench.engine.has_work
    assert len(run_to_end(bench.engine)) == 0


def test_a_cached_prefix_is_shown_to_another_worker_in_bites_each_announced_as_it_is_there() -> None:
    bench = Bench()
    bench.engine.add(1, LONG)
    bench.run()
    bench.engine.add(2, LONG, Kind.SOURCE)
    results = [bench.step() for _ in range(6)]
    filled = [[event.num_filled for event in result.filled] for result in results if result.filled]
    assert [entry for step in filled for entry in step] == [8, 16, 20] and len(filled) == 3
    assert [bool(result.prefilled) for result in results].index(True) == 2
    assert bench.memory.most["expose"] == BITE
    bench.engine.cancel(2)
    assert bench.engine.num_held_blocks == 0 and not bench.engine.has_work


def test_a_prompt_that_is_cancelled_while_it_is_shown_is_shown_no_further() -> None:
    bench = Bench()
    bench.engine.add(1, LONG)
    bench.run()
    bench.engine.add(2, LONG, Kind.SOURCE)
    bench.step()
    bench.engine.cancel(2)
    result = bench.step()
    assert not (result.filled or result.prefilled) and not bench.engine.outgoing.is_showing


def test_a_held_prefix_is_shown_in_bites_and_then_named() -> None:
    bench = Bench()
    bench.engine.add(1, LONG)
    bench.run()
    keys = bench.engine._kv.prompt_blocks(LONG.prompt_token_ids)
    bench.memory.num_since_step = dict.fromkeys(bench.memory.num_since_step, 0)
    for export_id in (5, 6):  # a quarter of the pool in all is held: six blocks, of which the second gets none
        bench.engine.outgoing.hold_prefix(export_id, tuple(map(keys.key, range(19))))
    held = {one.export_id: len(one.blocks) for result in [bench.step(), bench.step()] for one in result.held}
    assert held == {5: 6, 6: 0} and bench.memory.most["expose"] <= BITE
    bench.engine.outgoing.release_prefix(5)
    bench.engine.outgoing.release_prefix(6)
    assert bench.engine.num_held_blocks == 0
