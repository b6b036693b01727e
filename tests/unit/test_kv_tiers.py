"""Prefix blocks that left the pool come back from host memory or disk, or are computed: never a wrong token."""

from __future__ import annotations

import contextlib
import itertools
import random
from pathlib import Path

import pytest
from builders import fake_runner, generate_alone, make_engine, make_request, run_to_end, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tier_rig import FORMAT, GOLDEN, LAYOUT, PROMPT, damage, files_in, rig

from workers.kv_cache.block_hash import block_hashes
from workers.kv_tiers.folder import BlockFolder
from workers.kv_tiers.tiers import KvTiers
from workers.machine.pressure import MemoryWatch
from workers.request import Request
from workers.runner import BLOCK_SIZE
from workers.scheduler.sequence import Kind
from workers.status import Tier


def test_a_prefix_that_left_the_pool_comes_back_from_host_memory() -> None:
    with rig(num_host=32) as r:
        assert r.ask(PROMPT) == (GOLDEN, 0)
        r.push_out()
        assert r.ask(PROMPT) == (GOLDEN, 4 * BLOCK_SIZE)
        assert r.count("kv_host_hit_blocks") == 4


def test_while_memory_is_short_what_leaves_the_pool_is_dropped_and_tokens_are_the_same() -> None:
    available, seconds = [0], itertools.count()
    watch = MemoryWatch("blocks are dropped", 100, lambda: available[0], lambda: next(seconds))
    with rig(num_host=32, watch=watch) as r:
        assert r.ask(PROMPT) == (GOLDEN, 0)
        r.push_out()
        assert r.ask(PROMPT) == (GOLDEN, 0) and r.count("kv_dropped_blocks") > 0
        available[0] = 1000
        r.push_out()
        assert r.ask(PROMPT) == (GOLDEN, 4 * BLOCK_SIZE)


def test_a_prefix_that_left_the_pool_comes_back_from_disk(tmp_path: Path) -> None:
    with rig(folder=tmp_path) as r:
        assert r.ask(PROMPT) == (GOLDEN, 0)
        r.push_out()
        assert r.ask(PROMPT) == (GOLDEN, 4 * BLOCK_SIZE)
        assert r.count("kv_disk_hit_blocks") == 4


def test_a_prefix_may_come_from_pool_host_and_disk_at_once(tmp_path: Path) -> None:
    with rig(num_host=3, folder=tmp_path) as r:
        r.ask(PROMPT)
        r.push_out()
        assert r.ask(PROMPT) == (GOLDEN, 4 * BLOCK_SIZE)
        assert r.count("kv_host_hit_blocks") > 0 and r.count("kv_disk_hit_blocks") > 0


def test_host_memory_that_changed_is_refused_too() -> None:
    with rig(num_host=32) as r:
        r.ask(PROMPT)
        r.push_out()
        r.tiers._host[:, 3] ^= 1
        assert r.ask(PROMPT) == (GOLDEN, 0)
        assert r.count("kv_host_corrupt_blocks") == 1


def test_a_request_may_be_cancelled_while_it_waits_for_the_disk(tmp_path: Path) -> None:
    with rig(folder=tmp_path) as r:
        r.ask(PROMPT)
        r.push_out()
        r.engine.add(9000, PROMPT)
        r.engine.step()
        assert r.engine.load().num_transferring == 1
        r.engine.cancel(9000)
        assert r.engine.num_held_blocks == 0 and not r.engine.has_work
        assert r.ask(PROMPT) == (GOLDEN, 4 * BLOCK_SIZE)


def test_a_disk_that_does_not_answer_is_not_waited_for_longer_than_promised(tmp_path: Path) -> None:
    now = [0.0]
    with rig(folder=tmp_path, clock=lambda: now[0]) as r:
        r.ask(PROMPT)
        r.push_out()
        answers = r.tiers.poll
        r.tiers.poll = lambda: None  # type: ignore[method-assign]
        r.engine.add(9000, PROMPT)
        r.engine.add(9001, make_request([3] * 40, 4))
        outputs = r.engine.step().outputs
        assert [owner for owner, _ in outputs] == [9001], "others go on"
        now[0] = 6.0
        outputs += run_to_end(r.engine)
        assert tokens_of(outputs, 9000) == GOLDEN
        assert next(o for owner, o in outputs if owner == 9000).cached_tokens == 0
        r.tiers.poll = answers  # type: ignore[method-assign]
        assert r.ask(PROMPT)[0] == GOLDEN


def test_what_is_left_of_a_prompt_after_promotion_may_go_to_another_worker() -> None:
    with rig(num_host=32) as r:
        r.ask(make_request(PROMPT.prompt_token_ids[: 2 * BLOCK_SIZE + 1], 1))
        r.push_out()
        r.engine.add(9000, PROMPT, Kind.TARGET)
        (wanted,) = r.engine.step().transfers
        assert wanted.first_block == 2
        r.engine.cancel(9000)


def test_events_tell_routers_the_tier_of_each_block(tmp_path: Path) -> None:
    hashes = block_hashes(PROMPT.prompt_token_ids, BLOCK_SIZE)
    with rig(num_host=2, folder=tmp_path) as r:
        r.ask(PROMPT)
        before = r.dump()
        assert set(hashes) <= set(before.stored) and before.tiers == ()
        r.push_out()
        dump = r.dump()
        tiers = dict(zip(dump.stored, dump.tiers, strict=True))
        assert {tiers[h] for h in hashes} == {Tier.HOST, Tier.DISK}
        assert list(tiers.values()).count(Tier.HOST) == 2


def test_a_tier_keeps_its_bound(tmp_path: Path) -> None:
    with rig(num_host=2, folder=tmp_path, num_disk=3) as r:
        for start in range(10, 800, 60):
            r.ask(make_request(range(start, start + 3 * BLOCK_SIZE), 2))
            r.settle()
            assert len(files_in(tmp_path)) <= 3
            assert r.count("kv_host_bytes") <= 2 * LAYOUT.block_bytes
        assert sum(f.stat().st_size for f in files_in(tmp_path)) == 3 * FORMAT.file_bytes
        assert r.count("kv_disk_evicted_blocks") > 0


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[int, Request]]:
    """(step of arrival, request) pairs with few different prefixes, so that blocks go down and come up all the time."""
    jobs = []
    for index in range(draw(st.integers(2, 14))):
        family, length = draw(st.integers(0, 3)), draw(st.integers(1, 280))
        shared = draw(st.sampled_from([64, 128, 256]))
        tokens = [(i + 300 * family if i < shared else i * 7 + index) % 990 + 5 for i in range(length)]
        temperature = draw(st.sampled_from([0.0, 1.0]))
        request = make_request(tokens, max_tokens=draw(st.integers(1, 30)), temperature=temperature, seed=index)
        jobs.append((draw(st.integers(0, 60)), request))
    return jobs


@settings(max_examples=40, deadline=None)
@given(workloads(), st.integers(0, 5), st.sampled_from([0, 2, 40]), st.integers(6, 9), st.integers(0, 2**32))
def test_tokens_do_not_depend_on_tiers(
    tmp_path_factory: pytest.TempPathFactory,
    jobs: list[tuple[int, Request]],
    num_host: int,
    num_disk: int,
    num_blocks: int,
    seed: int,
) -> None:
    folder, rng = tmp_path_factory.mktemp("tiers"), random.Random(seed)
    runner = fake_runner(num_blocks)
    tiers = KvTiers(runner.kv_memory, num_host, BlockFolder(folder, FORMAT) if num_disk else None, num_disk)
    engine = make_engine(runner, tiers=tiers, max_num_seqs=4)
    try:
        outputs = []
        pending = sorted(enumerate(jobs), key=lambda item: item[1][0])
        step = 0
        while pending or engine.has_work:
            while pending and pending[0][1][0] <= step:
                index, (_, request) = pending.pop(0)
                engine.add(index, request)
            outputs += engine.step().outputs
            step += 1
            if engine.made_no_progress:
                engine.rest(timeout_s=1.0)
            if rng.random() < 0.1 and (files := files_in(folder)):
                with contextlib.suppress(OSError):  # the disk's thread may delete it first
                    damage(rng.choice(files), rng.choice(["flip", "cut", "gone"]), rng)
            assert step < 20_000
        for index, (_, request) in enumerate(jobs):
            assert tokens_of(outputs, index) == generate_alone(request)
        assert engine.num_held_blocks == 0
    finally:
        engine.close()
