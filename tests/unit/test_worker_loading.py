"""How far a worker has come with its checkpoint: counted where it is read, said in the store, shown by routers, the console and `baton status`."""

from __future__ import annotations

import asyncio
import io
from contextlib import aclosing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.console.output import MAX_NAMED, StepPrinter, loading_text, status_table
from cluster.membership.loading import LOADING, decode, encode, follow_loading, tell_loading
from cluster.store.memory import MemoryStore
from cluster.store.store import Entry
from router.backend import LoadingWorker
from workers.model.checkpoint.progress import loading
from workers.model.checkpoint.weights import Checkpoint
from workers.status import LoadProgress, Role

SHAPE = (8, 16)
HALF = LoadProgress(21 << 30, 42 << 30, 14, 28)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Four layers of 512 bytes each, and an expert's tensor in the last."""
    names = [f"model.layers.{layer}.q.weight" for layer in range(4)] + ["model.layers.3.mlp.experts.1.up.weight"]
    save_file({name: torch.zeros(SHAPE) for name in names}, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


def test_bytes_and_layers_are_counted_as_they_are_read_without_what_other_ranks_hold(checkpoint: Checkpoint) -> None:
    size = 8 * 16 * 4
    assert loading() == LoadProgress(0, 5 * size, 0, 4)
    checkpoint.take("model.layers.0.q.weight", SHAPE, torch.float32)
    assert loading() == LoadProgress(size, 5 * size, 1, 4)
    for _ in checkpoint.pieces("model.layers.1.q.weight", SHAPE, torch.float32):
        pass
    checkpoint.take_share("model.layers.2.q.weight", SHAPE, torch.float32, 0, 2, 4)
    checkpoint.skip("model.layers.3.mlp.experts.1.up.weight", SHAPE)
    assert loading() == LoadProgress(2 * size + size // 2, 4 * size - size // 2, 4, 4)
    checkpoint.skip_rows("model.layers.3.q.weight", SHAPE, 6)
    for _ in checkpoint.pieces("model.layers.3.q.weight", SHAPE, torch.float32, (6, 2)):
        pass
    done = loading()
    assert done.num_bytes_read == done.num_bytes


async def test_a_worker_says_how_far_it_is_for_as_long_as_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.membership.loading.EVERY_S", 0.01)
    monkeypatch.setattr("cluster.membership.loading.GATHER_S", 0.0)
    store = MemoryStore()
    await store.put(LOADING + "stranger", "no word of a worker")
    telling = asyncio.create_task(tell_loading(store, "decode-3", Role.DECODE, lambda: HALF))
    async with asyncio.timeout(30), aclosing(follow_loading(store)) as changes:
        async for workers in changes:
            if workers:
                break
        assert workers == (LoadingWorker("decode-3", Role.DECODE, HALF),)
        telling.cancel()
        async for workers in changes:
            if not workers:
                break
    assert [entry.key for entry in (await store.list(LOADING)).entries] == [LOADING + "stranger"]


@pytest.mark.parametrize(
    "value",
    ["", "[]", "{}", '{"role": "boss", "progress": [1, 2, 3, 4]}', '{"role": "mixed", "progress": [1, 2, 3]}',
     '{"role": "mixed", "progress": [-1, 2, 3, 4]}', '{"role": "mixed", "progress": [1.5, 2, 3, 4]}', "[" * 5000],
)  # fmt: skip
def test_what_is_no_word_of_a_worker_is_left_out(value: str) -> None:
    assert decode(Entry(LOADING + "x", value, 1)) is None
    assert decode(Entry(LOADING + "x", encode(Role.MIXED, HALF), 1)) == LoadingWorker("x", Role.MIXED, HALF)


def test_the_console_shows_those_that_are_furthest_behind_and_the_number_of_the_others() -> None:
    coming = {f"decode-{at}": LoadProgress(at << 30, 42 << 30, at, 28) for at in range(5)} | {"new": LoadProgress()}
    text = loading_text(coming)
    assert text.startswith("decode-0 0 B of 42.0 GiB, layer 0 of 28; new begins; decode-1 1.0 GiB of 42.0 GiB")
    assert text.endswith(f"and {len(coming) - MAX_NAMED} more")
    status = {"num_running": 0, "num_waiting": 0, "workers": []}
    shown = status_table(status | {"loading": [{"worker_id": "decode-3", "progress": HALF._asdict()}]})
    assert "loading: decode-3 21.0 GiB of 42.0 GiB, layer 14 of 28" in shown
    stream = io.StringIO()
    printer = StepPrinter(stream)
    with printer.step("loading decode-3"):
        printer.note("too soon for a line")
        printer._noted_s -= 3600.0
        printer.note("decode-3 1.0 GiB of 42.0 GiB")
    assert stream.getvalue().splitlines()[0].strip() == "decode-3 1.0 GiB of 42.0 GiB"
