"""A disk tier's folder: it outlives a worker, belongs to one, and what is wrong in it costs time and never a token."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import IMPORT_PATHS, FakeModel, make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from running_workers import CONFIG, Attached
from tier_rig import FORMAT, GOLDEN, LAYOUT, PROMPT, damage, file_of, files_in, rig

from workers.errors import InvalidConfig
from workers.kv_cache.block_hash import PromptBlocks, block_hashes
from workers.kv_tiers.folder import (
    BadRecord,
    BlockFolder,
    Format,
    Scanned,
    checksum,
    decode_header,
    encode_header,
    fingerprint_bytes,
)
from workers.runner import BLOCK_SIZE
from workers.status import Role, Tier
from workers.worker import Worker


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
            victim = file_of(tmp_path, hashes[at])
            if not restart:
                damage(victim, how, rng)
                assert r.ask(PROMPT) == (GOLDEN, at * BLOCK_SIZE)
                assert r.count("kv_disk_corrupt_blocks") >= 1
        if restart:
            damage(victim, how, rng)
            with rig(folder=tmp_path) as r:
                assert r.ask(PROMPT) == (GOLDEN, at * BLOCK_SIZE)
                assert r.count("kv_disk_corrupt_blocks") == (0 if how == "gone" else 1)


def test_a_start_looks_at_names_and_sizes_and_opens_nothing(tmp_path: Path) -> None:
    home = tmp_path / FORMAT.fingerprint.hex()
    hashes = block_hashes(PROMPT.prompt_token_ids, BLOCK_SIZE)
    for age, block_hash in enumerate(hashes):
        name = f"{block_hash:016x}"
        (home / name[:2]).mkdir(parents=True, exist_ok=True)
        file = home / name[:2] / f"{name}.kv"
        with file.open("wb") as stream:
            stream.truncate(FORMAT.file_bytes)  # as large as a block, and none
        os.utime(file, (1000 - age, 1000 - age))
    folder = BlockFolder(tmp_path, FORMAT)
    found = [step for step in folder.scan() if step is not None]
    folder.close()
    assert found == [Scanned(tuple(reversed(hashes)))]
    with rig(folder=tmp_path) as r:
        assert r.dump().tiers.count(Tier.DISK) == len(hashes)
        assert r.ask(PROMPT) == (GOLDEN, 0)  # the first that is read is refused
        assert r.count("kv_disk_corrupt_blocks") >= 1


def test_many_blocks_are_spread_over_folders_and_found_in_steps(tmp_path: Path) -> None:
    folder = BlockFolder(tmp_path, FORMAT)
    payload = np.zeros(FORMAT.block_bytes, np.uint8)
    prompt = PromptBlocks.of([i % 997 for i in range(400 * BLOCK_SIZE)], BLOCK_SIZE)
    for index in range(400):
        folder.write(prompt.key(index), payload, checksum(payload))
    assert max(len(list(part.iterdir())) for part in (tmp_path / FORMAT.fingerprint.hex()).iterdir()) < 20
    steps = list(folder.scan())
    folder.close()
    assert sorted(h for step in steps if step is not None for h in step.hashes) == sorted(prompt.hashes)
    assert len(steps) > 100


def test_a_disk_thread_that_fails_in_an_unforeseen_way_ends_the_tier_and_nobody_waits(tmp_path: Path) -> None:
    with rig(folder=tmp_path) as r:
        r.ask(PROMPT)
        r.push_out()
        assert r.tiers._disk is not None
        folder = r.tiers._disk._folder

        def fail(*args: object) -> None:
            raise MemoryError("no more")

        folder.read = fail  # type: ignore[method-assign, assignment]
        assert r.ask(PROMPT) == (GOLDEN, 0)
        folder.write = fail  # type: ignore[method-assign]
        r.ask(make_request([3] * (BLOCK_SIZE * 3), 2))
        r.push_out()
        assert r.tiers._disk is None and r.count("kv_disk_failures") == 1
        assert r.ask(PROMPT)[0] == GOLDEN


def test_every_single_bit_of_a_file_counts() -> None:
    tokens = tuple(range(BLOCK_SIZE))
    key = PromptBlocks.of(tokens, BLOCK_SIZE).key(0)
    header = encode_header(FORMAT, key, 5)
    assert decode_header(FORMAT, header) == (key, 5)
    for bit in range(8 * len(header)):
        spoiled = bytearray(header)
        spoiled[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadRecord):
            decode_header(FORMAT, bytes(spoiled))


@settings(max_examples=int(os.environ.get("BATON_FUZZ_EXAMPLES", "200")))
@given(
    st.binary(max_size=2 * FORMAT.header_bytes) | st.binary(min_size=FORMAT.header_bytes, max_size=FORMAT.header_bytes)
)
def test_a_header_of_any_bytes_is_refused(header: bytes) -> None:
    with pytest.raises(BadRecord):
        decode_header(FORMAT, header)


@pytest.mark.parametrize("kind", ["a pipe", "a link", "a folder"])
def test_what_is_no_file_in_the_place_of_one_costs_nobody_a_wait(kind: str, tmp_path: Path) -> None:
    with rig(folder=tmp_path) as r:
        r.ask(PROMPT)
        r.push_out()
        for path in files_in(tmp_path):
            kept = path.rename(path.with_suffix(".kept"))
            if kind == "a pipe":
                os.mkfifo(path)
            elif kind == "a link":
                path.symlink_to(kept)
            else:
                path.mkdir()
        assert r.ask(PROMPT)[0] == GOLDEN


def test_a_full_disk_switches_the_tier_off_with_one_warning_and_all_goes_on(tmp_path: Path) -> None:
    """In a process whose files may not grow to the size of a block."""
    story = f"""
        import logging, resource, sys
        logging.basicConfig(stream=sys.stdout)
        from pathlib import Path
        from tier_rig import GOLDEN, PROMPT, rig
        with rig(folder=Path({str(tmp_path)!r})) as r:
            resource.setrlimit(resource.RLIMIT_FSIZE, ({FORMAT.file_bytes - 100}, resource.RLIM_INFINITY))
            for _ in range(4):
                assert r.ask(PROMPT)[0] == GOLDEN
                r.ask(__import__("builders").make_request([7] * 321, 1))
                r.tiers.wait(30)
            assert r.count("kv_disk_failures") == 1 and r.tiers._disk is None
            assert r.count("kv_disk_bytes") == 0
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(story)],
        env={**os.environ, "PYTHONPATH": IMPORT_PATHS},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("the KV disk tier is off") == 1 and not files_in(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


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
