"""A prompt for another worker leaves the CUDA path's pool layer by layer, while its step is under way.

Without a GPU the kernels run in Triton's interpreter and are done when they are launched; the thread that copies and tells is the
one of a GPU.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import PlainDetokenizer, make_engine, make_request, run_to_end, tokens_of
from test_cuda_runner import load_cuda
from test_worker import Attached, tokens

from tests.unit.model_configs import decode, prefill, random_tokens, small_dense
from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.engine.messages import LayersFilled
from workers.model.cuda.copy_engine import HostCopies, Mark, Reached
from workers.model.cuda.runner import CudaRunner, LaunchedStep
from workers.request import Request
from workers.runner import Batch, LayerHook, Sampled
from workers.scheduler.sequence import Kind
from workers.status import Role, WorkerAddress
from workers.worker import Worker

NUM_LAYERS = 3
NUM_HEADS, HEAD_DIM = (8, 128) if torch.cuda.is_available() else (1, 1024)
"""A GPU has no room for tiles of the wide head; the interpreter takes its time for each head and row."""

PROMPT, OTHER = random_tokens(5, vocab_size=64), random_tokens(3, seed=1, vocab_size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer of a block is 512 KiB: each is a piece."""
    return small_dense(
        tmp_path_factory.mktemp("checkpoint"), vocab_size=64, hidden_size=32, intermediate_size=32,
        num_hidden_layers=NUM_LAYERS, num_attention_heads=NUM_HEADS, num_key_value_heads=NUM_HEADS, head_dim=HEAD_DIM,
        max_position_embeddings=192,
    ).folder  # fmt: skip


@pytest.fixture
def runner(folder: Path) -> Iterator[CudaRunner]:
    loaded = load_cuda(folder, kv_memory_bytes=16 << 20, deterministic=False)
    yield loaded
    loaded.kv_memory.close()


def shown(runner: CudaRunner, block: int, num_layers: int = NUM_LAYERS) -> bytes:
    return runner.kv_memory.block(block, 0, num_layers).tobytes()


def on_device(runner: CudaRunner, block: int, num_layers: int = NUM_LAYERS) -> bytes:
    return runner._pool.values[block, :num_layers].cpu().numpy().tobytes()


def listen(engine: Engine, hear: Callable[[LayersFilled], None]) -> None:
    engine.outgoing.on_layers = hear


def spoil(runner: CudaRunner) -> None:
    with torch.inference_mode():
        runner._pool.values.fill_(7)


def test_the_engine_tells_of_layers_before_the_step_ends_when_they_are_on_the_host(runner: CudaRunner) -> None:
    engine = make_engine(runner, max_model_len=192)
    spans: list[tuple[int, int, int, int]] = []
    bytes_then: list[tuple[int, int, bytes]] = []
    threads: set[threading.Thread] = set()

    def hear(event: LayersFilled) -> None:
        threads.add(threading.current_thread())
        spans.append((event.sequence_id, event.first, event.end, event.num_layers))
        for block in event.blocks[event.first : event.end]:
            bytes_then.append((block, event.num_layers, shown(runner, block, event.num_layers)))

    listen(engine, hear)
    engine.add(1, make_request(PROMPT), Kind.SOURCE)
    engine.add(2, make_request(OTHER), Kind.SOURCE)
    result = engine.step()
    assert spans == [(1, 0, 1, 1), (2, 0, 1, 1), (1, 0, 1, 2), (2, 0, 1, 2)]
    assert len(result.prefilled) == 2 and threading.current_thread() not in threads
    for block, layers, then in bytes_then:
        assert any(then) and then == shown(runner, block, layers) == on_device(runner, block, layers)
    for filled in result.filled:
        assert [shown(runner, b) for b in filled.blocks] == [on_device(runner, b) for b in filled.blocks]


@pytest.mark.parametrize("overlap_steps", [True, False])
def test_what_is_shown_and_drawn_is_the_same_without_a_listener(runner: CudaRunner, overlap_steps: bool) -> None:
    found = []
    for listens in (True, False):
        engine = make_engine(runner, max_model_len=192, overlap_steps=overlap_steps, prefix_cache=False)
        heard: list[LayersFilled] = []
        if listens:
            listen(engine, heard.append)
        engine.add(1, make_request(PROMPT), Kind.SOURCE)
        result = engine.step()
        assert len(heard) == (2 if listens else 0)
        found.append(([shown(runner, block) for block in result.filled[0].blocks], result.prefilled[0].sampled))
        runner.kv_memory.bytes[:] = 0
    assert found[0] == found[1]


def test_a_block_is_brought_to_the_host_once(runner: CudaRunner) -> None:
    """What the step has brought there is not looked at again when the step is over; what it has not is."""
    batch = Batch(prefill=(prefill(PROMPT, table=[3]), prefill(OTHER, table=[1])))
    runner.execute(batch, LayerHook(2, lambda num_layers: None, (3,)))
    before = on_device(runner, 3)
    spoil(runner)
    runner.kv_memory.expose([3, 1])
    assert shown(runner, 3) == before != on_device(runner, 3)
    assert shown(runner, 1) == on_device(runner, 1)


class SlowMark(Reached):
    def wait(self) -> None:
        threading.Event().wait(0.3)


class SlowCopies(HostCopies):
    """A launch, or what comes of it, fails long before these copies end."""

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Mark) -> Reached:
        super().copy(pairs, after)
        return SlowMark()


def test_a_step_that_fails_tells_of_nothing_afterwards_and_its_blocks_are_copied_when_they_are_asked_for(
    runner: CudaRunner,
) -> None:
    layers = runner._mirrored._layers
    layers.engine = SlowCopies()
    heard: list[int] = []
    good = prefill(PROMPT, table=[3])
    hook = LayerHook(1, heard.append, (3,))

    def nothing_more(so_far: list[int]) -> None:
        behind = runner._mirrored.follow(LayerHook(NUM_LAYERS, heard.append, (5,)))
        assert behind is not None
        behind.filled(NUM_LAYERS)
        behind.finish()  # everything before it has been gone through
        assert heard == so_far

    with pytest.raises(IndexError, match="longest sequence"):
        runner.launch(Batch((good,), (decode(5, 192, [2, 4, 5, 6]),)), None, hook)
    nothing_more(list(heard))
    launched = runner.launch(Batch((good,)), None, hook)
    launched._host_R = None  # type: ignore[assignment]  # as good as a device that is lost
    with pytest.raises(AttributeError):
        runner.finish(launched)
    nothing_more(list(heard))
    spoil(runner)
    runner.kv_memory.expose([3])
    assert shown(runner, 3) == on_device(runner, 3)


class CudaModel:
    """A LoadedModel around a runner."""

    vocabulary = None

    def __init__(self, runner: CudaRunner) -> None:
        self.runner, self.info, self.eos_token_ids = runner, runner.model_info, runner.eos_token_ids

    def make_detokenizer(self, request: Request) -> PlainDetokenizer:
        return PlainDetokenizer()


class Held(CudaModel):
    """Its steps do not end before `condition` holds."""

    def __init__(self, runner: CudaRunner, condition: Callable[[], bool]) -> None:
        super().__init__(runner)
        finish = runner.finish

        def finish_late(launched: LaunchedStep) -> list[Sampled]:
            deadline = time.monotonic() + 60
            while not condition():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            return finish(launched)

        runner.finish = finish_late  # type: ignore[method-assign]


@pytest.mark.parametrize("transport", ["shm", "tcp", "grpc", "gloo"])
async def test_layers_reach_another_worker_before_the_step_that_computes_them_ends(
    folder: Path, runner: CudaRunner, transport: str
) -> None:
    request = make_request(PROMPT, 3)
    alone = make_engine(runner, max_model_len=192, prefix_cache=False)
    alone.add(0, request)
    expected = tokens_of(run_to_end(alone), 0)
    target = load_cuda(folder, kv_memory_bytes=16 << 20, deterministic=False)
    arrived = target.kv_memory.bytes.reshape(-1, NUM_LAYERS, target.kv_memory.layout.layer_bytes)
    models = {"prefill-0": Held(runner, lambda: bool(arrived[:, 1].any())), "decode-0": CudaModel(target)}
    config = WorkerConfig(model="fake", local_prefill_tokens=0, transports=(transport,))
    async with contextlib.AsyncExitStack() as stack:
        addresses: list[WorkerAddress] = []
        for name, role in (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE)):
            worker = Worker(config, name, 1, role, load=partial(lambda name, config: models[name], name))
            stack.push_async_callback(worker.stop)
            addresses.append(await worker.start())
        router = await Attached(addresses[1]).start()
        stack.push_async_callback(router.close)
        await router.submit(request, addresses[0])
        outputs = await router.finish("r")
        assert tokens(outputs) == expected
        assert outputs[0].handoff is not None and outputs[0].handoff.transport == transport
    assert not [thread for thread in threading.enumerate() if thread.name == "kv-layers"]


def test_a_step_without_blocks_for_others_starts_no_thread(runner: CudaRunner) -> None:
    runner.execute(Batch(prefill=(prefill(PROMPT, table=[3]),)), LayerHook(1, lambda n: None))
    assert runner._mirrored._layers._thread is None
