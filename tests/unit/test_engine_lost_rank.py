"""A rank that is lost while blocks are brought from it or to it ends what needed those blocks, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from builders import fake_layout, generate_alone, make_engine, make_request, run_to_end, step_until, tokens_of

from workers.engine.fake_runner import FakeRunner
from workers.engine.messages import ExportEnded, PrefixHeld
from workers.errors import RankLost, Refusal
from workers.kv_memory.memory import KvMemory
from workers.request import FinishReason
from workers.runner import BLOCK_SIZE
from workers.status import PrefixHint, WorkerAddress

PROMPT = make_request(range(10, 10 + 3 * BLOCK_SIZE + 9), 40)
PEER = WorkerAddress("peer", 1, "127.0.0.1:1")


class LosingMemory(KvMemory):
    """As that of a group one of whose ranks, which holds a part of every block, can be lost."""

    is_lost = False

    def expose(self, blocks: Sequence[int]) -> None:
        if self.is_lost and blocks:
            raise RankLost("rank 3 is lost")

    adopt = expose


def test_a_sequence_that_cannot_be_shown_to_its_new_home_goes_on_here() -> None:
    memory = LosingMemory(fake_layout())
    engine = make_engine(FakeRunner(memory))
    engine.add(1, PROMPT)
    outputs = [output for _ in range(10) for output in engine.step().outputs]
    memory.is_lost = True
    engine.export(1, 0, 8)
    result = engine.step()
    assert result.exports == [ExportEnded(1, "rank 3 is lost")]
    memory.is_lost = False
    outputs += result.outputs + run_to_end(engine)
    assert tokens_of(outputs, 1) == generate_alone(PROMPT)
    assert engine.num_held_blocks == 0


def test_a_sequence_that_cannot_be_taken_over_ends_with_an_error_that_its_router_recovers_from() -> None:
    memory = LosingMemory(fake_layout())
    engine = make_engine(FakeRunner(memory))
    engine.incoming.add_migrant(9, PROMPT)
    step_until(engine, "transfers")
    memory.is_lost = True
    engine.incoming.moved_in(9, (5, 6), len(PROMPT.prompt_token_ids) + 1)
    ((_, output),) = engine.step().outputs
    assert (output.finish_reason, output.refusal) == (FinishReason.ERROR, Refusal.WORKER_LOST)
    assert engine.num_held_blocks == 0


def test_a_prefix_that_a_peer_sent_in_vain_is_computed() -> None:
    memory = LosingMemory(fake_layout())
    engine = make_engine(FakeRunner(memory))
    engine.add(1, PROMPT, hint=PrefixHint(PEER, 3))
    (wanted,) = step_until(engine, "pulls").pulls
    assert len(wanted.keys) == 3
    memory.is_lost = True
    engine.incoming.pulled(1, 3)
    assert tokens_of(run_to_end(engine), 1) == generate_alone(PROMPT)
    assert engine.num_held_blocks == 0


def test_a_prefix_that_cannot_be_shown_is_not_held() -> None:
    asking = make_engine()
    asking.add(1, PROMPT, hint=PrefixHint(PEER, 3))
    (wanted,) = step_until(asking, "pulls").pulls
    memory = LosingMemory(fake_layout())
    engine = make_engine(FakeRunner(memory))
    engine.add(1, PROMPT)
    run_to_end(engine)
    memory.is_lost = True
    engine.outgoing.hold_prefix(7, wanted.keys)
    assert step_until(engine, "held").held == [PrefixHeld(7, ())]
    assert engine.num_held_blocks == 0
    memory.is_lost = False
    engine.outgoing.hold_prefix(8, wanted.keys[:2])
    (held,) = step_until(engine, "held").held
    assert len(held.blocks) == 2, "it is a quarter of the pool that may be held, and none was"


def test_a_sequence_that_has_ended_has_nothing_left_to_lose() -> None:
    """A step that was launched before still holds it; its client has heard all."""
    engine = make_engine()
    engine.add(1, PROMPT)
    engine.step()
    sequence = engine.sequence(1)
    assert sequence is not None
    engine.cancel(1)
    engine.incoming.lose(sequence)
    assert engine.step().outputs == [] and engine.num_held_blocks == 0
