"""Layers of a prompt are announced while later layers are computed, and what is announced never changes again."""

from __future__ import annotations

import pytest
from builders import fake_layout, make_engine, make_request

from tests.unit.model_configs import load, moe_with_shared_experts, prefill, random_tokens
from workers.engine.fake_runner import FakeRunner, LateFakeRunner
from workers.engine.messages import LayersFilled
from workers.kv_memory.memory import KvLayout, KvMemory
from workers.model.cpu.runner import TorchRunner
from workers.runner import Batch, LayerHook
from workers.scheduler.sequence import Kind

LAYOUT = KvLayout(16, 4, 8, 64, 128, "float32", 4)
"""A layer of 512 KiB: each is a piece."""


@pytest.fixture(scope="module", params=[True, False], ids=["native", "torch"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    folder = moe_with_shared_experts(tmp_path_factory.mktemp("checkpoint")).folder
    return load(folder, "bfloat16", native=request.param)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_announced_layers_hold_what_they_hold_after_the_step(runner: TorchRunner, every: int) -> None:
    memory = runner.kv_memory
    num_layers, table = memory.layout.num_layers, (3, 1, 7)
    memory.bytes[:] = 0
    seen: dict[int, list[bytes]] = {}

    def heard(layers: int) -> None:
        seen[layers] = [memory.block(block, 0, layers).tobytes() for block in table]

    tokens = random_tokens(192)
    with_hook = runner.execute(Batch(prefill=(prefill(tokens, table=table),)), LayerHook(every, heard))
    assert list(seen) == list(range(every, num_layers, every))
    for layers, blocks in seen.items():
        assert blocks == [memory.block(block, 0, layers).tobytes() for block in table]
        assert all(any(block) for block in blocks)
    assert with_hook == runner.execute(Batch(prefill=(prefill(tokens, table=table),)))


@pytest.mark.parametrize("kind", [FakeRunner, LateFakeRunner])
def test_the_engine_tells_of_blocks_that_a_chunk_fills_and_of_no_others(kind: type[FakeRunner]) -> None:
    engine = make_engine(kind(KvMemory(LAYOUT)), max_batch_tokens=100)
    heard: list[LayersFilled] = []
    engine.outgoing.on_layers = heard.append
    engine.add(1, make_request(range(5, 225)), Kind.SOURCE)
    engine.add(2, make_request(range(300, 340)))
    spans = []
    while not (result := engine.step()).prefilled:
        spans.append([(e.first, e.end, e.num_layers) for e in heard if e.sequence_id == 1])
        heard.clear()
        assert result.filled
    spans.append([(e.first, e.end, e.num_layers) for e in heard if e.sequence_id == 1])
    assert spans == [
        [(0, 1, layers) for layers in (1, 2, 3)],
        [(1, 3, layers) for layers in (1, 2, 3)],
        [(3, 4, layers) for layers in (1, 2, 3)],
    ]
    assert all(e.sequence_id == 1 for e in heard)


def test_where_a_block_is_one_piece_nothing_is_told_in_mid_step() -> None:
    engine = make_engine(FakeRunner(KvMemory(fake_layout())))
    engine.outgoing.on_layers = lambda event: pytest.fail("a block of one piece has no first layers")
    engine.add(1, make_request(range(5, 225)), Kind.SOURCE)
    while not engine.step().prefilled:
        pass


def test_a_listener_changes_no_token_of_others() -> None:
    def run(listens: bool) -> list[int]:
        engine = make_engine(FakeRunner(KvMemory(LAYOUT)))
        engine.outgoing.on_layers = (lambda event: None) if listens else None
        engine.add(1, make_request(range(5, 225)), Kind.SOURCE)
        engine.add(2, make_request(range(300, 340), max_tokens=9))
        tokens: list[int] = []
        while len(tokens) < 9:
            tokens += [t for owner, output in engine.step().outputs if owner == 2 for t in output.token_ids]
        return tokens

    assert run(True) == run(False)
