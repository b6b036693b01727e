"""Prefix blocks that left the pool come back from host memory or disk, or are computed: never a wrong token."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import (
    FakeModel,
    fake_layout,
    fake_runner,
    generate_alone,
    make_engine,
    make_request,
    run_to_end,
    tokens_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_worker import CONFIG, Attached

from workers.engine import Engine
from workers.errors import InvalidConfig
from workers.kv_cache.block_hash import block_hashes
from workers.kv_cache.prefix_cache import block_key
from workers.kv_tiers.folder import BlockFolder
from workers.kv_tiers.record import BadRecord, Format, decode_header, encode_header, fingerprint_bytes
from workers.kv_tiers.tiers import KvTiers
from workers.request import Request
from workers.runner import BLOCK_SIZE, FakeRunner
from workers.scheduler.sequence import Kind
from workers.status import KvEvent, Role, Tier
from workers.worker import Worker

LAYOUT = fake_layout()
FORMAT = Format(fingerprint_bytes("fake-1"), BLOCK_SIZE, LAYOUT.block_bytes)
POOL_BLOCKS = 6


class Rig:
    """An engine with a small pool, and what lies below it."""

    def __init__(
        self,
        num_host: int = 0,
        folder: Path | None = None,
        num_disk: int = 64,
        form: Format = FORMAT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner: FakeRunner = fake_runner(POOL_BLOCKS)
        blocks = BlockFolder(folder, form) if folder is not None else None
        self.tiers = KvTiers(self.runner.kv_memory, num_host, blocks, num_disk)
        self.engine: Engine = make_engine(self.runner, tiers=self.tiers, clock=clock)
        self._ids = iter(range(1, 10_000))

    def ask(self, request: Request) -> tuple[list[int], int]:
        """Tokens and cached tokens of a request that runs alone."""
        name = next(self._ids)
        self.engine.add(name, request)
        outputs = run_to_end(self.engine)
        assert self.engine.num_held_blocks == 0
        return tokens_of(outputs, name), outputs[0][1].cached_tokens

    def push_out(self) -> None:
        """Fills the pool with other blocks, and lets the disk finish."""
        self.ask(make_request([7] * (BLOCK_SIZE * (POOL_BLOCKS - 1) + 1), 1))
        self.settle()

    def settle(self) -> None:
        """Until the disk has nothing left to do and the engine knows."""
        while not self.tiers.is_idle:
            self.tiers.wait(30)
            self.engine.step()
        self.engine.step()

    def dump(self) -> KvEvent:
        """All that the worker says it has."""
        self.engine.dump_cache()
        event = self.engine.step().kv_event
        assert event is not None
        return event

    def count(self, name: str) -> float:
        return dict(self.engine.counters()).get(name, 0)


@contextlib.contextmanager
def rig(num_host: int = 0, folder: Path | None = None, num_disk: int = 64, **settings: Any) -> Iterator[Rig]:
    made = Rig(num_host, folder, num_disk, **settings)
    try:
        yield made
    finally:
        made.engine.close()


PROMPT = make_request(range(10, 10 + 4 * BLOCK_SIZE + 5), 12)
GOLDEN = generate_alone(PROMPT)


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


def test_a_prefix_that_left_the_pool_comes_back_from_host_memory() -> None:
    with rig(num_host=32) as r:
        assert r.ask(PROMPT) == (GOLDEN, 0)
        r.push_out()
        assert r.ask(PROMPT) == (GOLDEN, 4 * BLOCK_SIZE)
        assert r.count("kv_host_hit_blocks") == 4


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


def test_blocks_survive_a_restart_of_the_worker(tmp_path: Path) -> None:
    with rig(folder=tmp_path) as r:
        r.ask(PROMPT)
        r.push_out()
    with rig(folder=tmp_path) as r:
        assert r.dump().tiers.count(Tier.DISK) >= 4
        assert r.ask(PROMPT) == (GOLDEN, 4 * BLOCK_SIZE)


def test_two_workers_never_share_a_folder_and_a_dead_ones_folder_is_free(tmp_path: Path) -> None:
    with rig(folder=tmp_path), pytest.raises(InvalidConfig, match="in use by another worker"):
        BlockFolder(tmp_path, FORMAT)
    BlockFolder(tmp_path, FORMAT).close()


def test_blocks_of_another_model_are_deleted_and_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with rig(folder=tmp_path) as r:
        r.ask(PROMPT)
        r.push_out()
        count = len(files_in(tmp_path))
    other = Format(fingerprint_bytes("another"), BLOCK_SIZE, LAYOUT.block_bytes)
    with rig(folder=tmp_path, form=other) as r:
        assert count >= 4 and r.count("kv_disk_corrupt_blocks") == count
        assert not files_in(tmp_path) and (tmp_path / "thesis.txt").read_text() == "mine"
        assert r.ask(PROMPT)[1] == 0


def test_files_are_for_the_workers_user_alone(tmp_path: Path) -> None:
    with rig(folder=tmp_path / "private") as r:
        r.ask(PROMPT)
        r.push_out()
        assert (tmp_path / "private").stat().st_mode & 0o077 == 0
        assert all(file.stat().st_mode & 0o077 == 0 for file in files_in(tmp_path / "private"))


def damage(path: Path, how: str, rng: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    match how:
        case "flip":
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        case "cut":
            del raw[rng.randrange(len(raw)) :]
        case "grow":
            raw += b"x"
        case "gone":
            path.unlink()
            return
        case "swap":
            others = [other for other in files_in(path.parent) if other != path]
            raw = bytearray(rng.choice(others).read_bytes())
    path.write_bytes(raw)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("how", ["flip", "cut", "grow", "gone", "swap"])
def test_a_damaged_file_costs_time_and_never_a_token(how: str, restart: bool, tmp_path: Path) -> None:
    rng = random.Random(how)
    for _ in range(4):
        with rig(folder=tmp_path) as r:
            r.ask(PROMPT)
            r.push_out()
            hashes = block_hashes(PROMPT.prompt_token_ids, BLOCK_SIZE)
            at = rng.randrange(4)
            victim = tmp_path / f"{hashes[at]:016x}.kv"
            if not restart:
                damage(victim, how, rng)
                assert r.ask(PROMPT) == (GOLDEN, at * BLOCK_SIZE)
                assert r.count("kv_disk_corrupt_blocks") >= 1
        if restart:
            damage(victim, how, rng)
            with rig(folder=tmp_path) as r:
                assert r.ask(PROMPT) == (GOLDEN, at * BLOCK_SIZE)
                assert r.count("kv_disk_corrupt_blocks") == (0 if how == "gone" else 1)


def test_every_single_bit_of_a_file_counts() -> None:
    tokens = tuple(range(BLOCK_SIZE))
    key = block_key(block_hashes(tokens, BLOCK_SIZE), tokens, 0, BLOCK_SIZE)
    header = encode_header(FORMAT, key, 5)
    assert decode_header(FORMAT, header) == (key, 5)
    for bit in range(8 * len(header)):
        spoiled = bytearray(header)
        spoiled[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadRecord):
            decode_header(FORMAT, bytes(spoiled))


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


def test_a_full_disk_switches_the_tier_off_with_one_warning_and_all_goes_on(tmp_path: Path) -> None:
    """In a process whose files may not grow to the size of a block."""
    story = f"""
        import logging, resource, sys
        logging.basicConfig(stream=sys.stdout)
        from pathlib import Path
        from test_kv_tiers import GOLDEN, PROMPT, rig
        with rig(folder=Path({str(tmp_path)!r})) as r:
            resource.setrlimit(resource.RLIMIT_FSIZE, ({FORMAT.file_bytes - 100}, resource.RLIM_INFINITY))
            for _ in range(4):
                assert r.ask(PROMPT)[0] == GOLDEN
                r.ask(__import__("builders").make_request([7] * 321, 1))
                r.tiers.wait(30)
            assert r.count("kv_disk_failures") == 1 and not r.tiers.has_disk
            assert r.count("kv_disk_bytes") == 0
    """
    tests = Path(__file__).resolve().parent
    paths = os.pathsep.join(str(p) for p in (tests, tests.parent, tests.parent.parent))
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(story)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("the KV disk tier is off") == 1 and not files_in(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


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


async def test_a_worker_brings_blocks_back_from_its_disk_also_after_a_restart(tmp_path: Path) -> None:
    config = replace(CONFIG, kv_disk_folder=str(tmp_path), max_model_len=8 * BLOCK_SIZE)
    for start in (1, 2):
        worker = Worker(config, "mixed/0", start, Role.MIXED, load=lambda config: FakeModel(config, num_blocks=8))
        router = await Attached(await worker.start()).start()
        for name in ("first", "filler", "second"):
            request = make_request([9] * 450, 1) if name == "filler" else PROMPT
            await router.submit(replace(request, request_id=name))
            outputs = await router.finish(name)
            if name == "filler":
                async with asyncio.timeout(20):
                    while start == 1 and dict(worker.status().counters).get("kv_disk_stored_blocks", 0) < 4:
                        await asyncio.sleep(0.01)
                continue
            assert [token for output in outputs for token in output.token_ids] == GOLDEN
            assert outputs[0].cached_tokens == 4 * BLOCK_SIZE or (start, name) == (1, "first")
        counters = dict((await router.idle()).counters)
        assert counters["kv_disk_hit_blocks"] > 0
        await router.close()
        await worker.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["mixed%2F0"]


async def test_two_workers_of_one_name_do_not_start_on_one_folder(tmp_path: Path) -> None:
    config = replace(CONFIG, kv_disk_folder=str(tmp_path))
    first, second = (Worker(config, "mixed-0", 1, Role.MIXED, load=FakeModel) for _ in range(2))
    await first.start()
    with pytest.raises(InvalidConfig, match="in use by another worker"):
        await second.start()
    await second.stop()
    await first.stop()
    third = Worker(config, "mixed-0", 2, Role.MIXED, load=FakeModel)
    await third.start()
    await third.stop()
