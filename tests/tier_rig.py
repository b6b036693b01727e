"""An engine with a small pool and lower tiers below it, and ways to damage what they keep."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from builders import fake_layout, fake_runner, generate_alone, make_engine, make_request, run_to_end, tokens_of

from workers.engine.engine import Engine
from workers.engine.fake_runner import FakeRunner
from workers.kv_tiers.folder import BlockFolder, Format, fingerprint_bytes
from workers.kv_tiers.tiers import KvTiers
from workers.machine.pressure import MemoryWatch
from workers.request import Request
from workers.runner import BLOCK_SIZE
from workers.status import KvEvent

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
        watch: MemoryWatch | None = None,
    ) -> None:
        self.runner: FakeRunner = fake_runner(POOL_BLOCKS)
        blocks = BlockFolder(folder, form) if folder is not None else None
        self.tiers = KvTiers(self.runner.kv_memory, num_host, blocks, num_disk, watch)
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
        event = self.engine.step().kv_dump
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
    return sorted(folder.rglob("*.kv"))


def file_of(folder: Path, block_hash: int) -> Path:
    (found,) = folder.rglob(f"{block_hash:016x}.kv")
    return found


def damage(path: Path, how: str, rng: random.Random) -> None:
    """Nothing is left to damage of a file that has been cut to nothing."""
    raw = bytearray(path.read_bytes())
    if not raw and how in ("flip", "cut"):
        return
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
            others = [other for other in files_in(path.parents[1]) if other != path]
            raw = bytearray(rng.choice(others).read_bytes())
    path.write_bytes(raw)
