"""What the leader asks of a rank between steps: each question gets its own answer, and a rank that gives none is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from workers.config import ParallelConfig
from workers.errors import RankLost
from workers.group.channel import Channel
from workers.group.leader import Callbacks, GroupLeader, Truth
from workers.group.messages import (
    Blocks,
    Declined,
    Failed,
    Form,
    Formed,
    GetBlocks,
    Hello,
    Message,
    PutBlocks,
    Ready,
    Welcome,
)

BOUND_S = 60.0
TOKEN = "a leader of tests"


@dataclass
class Pair:
    """A leader, and rank 1 in the hands of the test."""

    leader: GroupLeader
    rank: Channel
    lost: dict[int, str] = field(default_factory=dict)
    has_lost: threading.Event = field(default_factory=threading.Event)

    def hear(self, kind: type[Message]) -> Message:
        """The next message of a kind; others are passed over."""
        while not isinstance(message := self.rank.receive(), kind):
            pass
        return message

    def hear_question(self) -> GetBlocks | PutBlocks:
        while not isinstance(message := self.rank.receive(), GetBlocks | PutBlocks):
            pass
        return message

    def form(self) -> int:
        """Both ranks enter the next epoch."""
        self.rank.send(Ready("the model"))
        self.leader.own_ready("the model")
        form = self.hear(Form)
        assert isinstance(form, Form)
        self.rank.send(Formed(form.epoch))
        self.leader.own_formed(form.epoch)
        assert self.leader.wait_serving(BOUND_S)
        return form.epoch


@contextmanager
def pair(step_timeout_s: float = BOUND_S, forms: bool = True) -> Iterator[Pair]:
    lost: dict[int, str] = {}
    has_lost = threading.Event()

    def on_lost(rank: int, reason: str) -> None:
        lost[rank] = reason
        has_lost.set()

    callbacks = Callbacks(
        truth=lambda: Truth([], "mixed", 0), form=lambda form: None, abort=lambda epoch: None, lost=on_lost
    )
    parallel = ParallelConfig(expert_parallel=2, heartbeat_timeout_s=BOUND_S, step_timeout_s=step_timeout_s)
    leader = GroupLeader(parallel, callbacks, num_blocks=4, store=("127.0.0.1", 1), token=TOKEN)
    rank = Channel.connect(*leader.start("127.0.0.1"), BOUND_S, TOKEN)
    try:
        rank.send(Hello(1, 2, 1, "here", ""))
        made = Pair(leader, rank, lost, has_lost)
        made.hear(Welcome)
        if forms:
            made.form()
        yield made
    finally:
        leader.stop()
        rank.close()


def test_answers_find_their_questions_in_whatever_order_they_come() -> None:
    with pair() as group, ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(group.leader.ask, 1, GetBlocks([block])) for block in (0, 1)]
        for question in reversed([group.hear_question() for _ in asked]):
            group.rank.send(Blocks(question.number, bytes(question.blocks)))
        assert [future.result(BOUND_S).tail for future in asked] == [bytes([0]), bytes([1])]


def test_a_late_answer_to_a_question_of_an_epoch_that_is_over_answers_nothing_else() -> None:
    with pair() as group, ThreadPoolExecutor(1) as threads:
        asked = threads.submit(group.leader.ask, 1, GetBlocks([0]))
        first = group.hear_question()
        group.rank.send(Failed(first.epoch, "a peer is gone", is_broken=True))
        with pytest.raises(RankLost, match="the epoch ended"):
            asked.result(BOUND_S)
        assert group.form() == first.epoch + 1
        with pytest.raises(RankLost, match="between two epochs"):
            group.leader.ask(1, GetBlocks([0]), first.epoch)
        asked = threads.submit(group.leader.ask, 1, GetBlocks([2]))
        second = group.hear_question()
        assert second.epoch == first.epoch + 1
        group.rank.send(Blocks(first.number, b"late"))
        group.rank.send(Blocks(second.number, b"asked for"))
        assert asked.result(BOUND_S).tail == b"asked for"
        assert not group.lost


def test_a_rank_that_does_not_answer_is_lost() -> None:
    with pair(step_timeout_s=0.2) as group:
        with pytest.raises(RankLost, match="rank 1 did not move its blocks within"):
            group.leader.ask(1, PutBlocks([1]))
        assert group.has_lost.wait(BOUND_S) and list(group.lost) == [1]
        assert not group.leader.is_serving
        with pytest.raises(RankLost):
            while True:
                group.rank.receive()


@pytest.mark.parametrize("is_leader_first", [True, False])
def test_a_rank_with_other_kernels_is_declined_whoever_loads_first(is_leader_first: bool) -> None:
    with pair(forms=False) as group:
        theirs, ours = Ready("a", kernels="torch"), ("b", False, "native fma")
        if is_leader_first:
            group.leader.own_ready(*ours)
            group.rank.send(theirs)
        else:
            group.rank.send(theirs)
            while 1 not in group.leader._ready:
                group.leader.wait_serving(0.01)
            group.leader.own_ready(*ours)
        declined = group.hear(Declined)
        assert isinstance(declined, Declined)
        assert declined.message.startswith("it computes with torch, and the leader with native fma: all ranks need")
        assert group.has_lost.wait(BOUND_S) and group.lost == {1: declined.message}
        assert not group.leader.is_serving
