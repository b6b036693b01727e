"""A rank whose device nothing can free after an abort ends with its thread; one that comes back goes on."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from workers.config import ParallelConfig
from workers.errors import DeviceStuck, RankLost
from workers.group.epoch_member import EpochMember
from workers.group.messages import Form
from workers.model.parallel.collectives import Links
from workers.model.parallel.epoch import start_store
from workers.model.parallel.layout import SINGLE


class DirectRank:
    """As much of workers.model.decoder.rank.Rank as joining and leaving take."""

    layout, device, is_direct = SINGLE, "cpu", False

    def prepare(self, direct: bool, store: Any) -> None:
        return None

    def use_buffers(self, buffers: Any) -> None:
        self.is_direct = True

    def left(self) -> None:
        pass


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_thread_that_does_not_come_back_from_a_device_is_not_waited_for(
    comes_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    died: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    store = start_store("127.0.0.1")
    member = EpochMember(DirectRank(), Links(), "127.0.0.1", stuck_s=60.0 if comes_back else 0.1)  # type: ignore[arg-type]
    member.prepare(1)
    member.join(Form(1, "127.0.0.1", store.port, [], "mixed", 1, direct=True), ParallelConfig())
    member.abort(1)
    watches = [thread for thread in threading.enumerate() if thread.name == "group-stuck"]
    if comes_back:
        member.leave()
    for thread in watches:
        thread.join(30)
        assert not thread.is_alive()
    assert [args.exc_type for args in died] == ([] if comes_back else [DeviceStuck])
    member.leave()


class SlowRank(DirectRank):
    """One whose part of meeting the others takes until somebody lets it end."""

    def __init__(self) -> None:
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self.num_used = 0

    def prepare(self, direct: bool, store: Any) -> None:
        self.has_begun.set()
        assert self.may_end.wait(60)

    def use_buffers(self, buffers: Any) -> None:
        self.num_used += 1


def test_what_is_prepared_for_an_epoch_that_is_over_is_never_used() -> None:
    store, rank = start_store("127.0.0.1"), SlowRank()
    member = EpochMember(rank, Links(), "127.0.0.1")  # type: ignore[arg-type]
    form = Form(1, "127.0.0.1", store.port, [], "mixed", 1)
    member.prepare(1)
    ended: list[RankLost] = []

    def join() -> None:
        with pytest.raises(RankLost) as caught:
            member.join(form, ParallelConfig())
        ended.append(caught.value)

    joining = threading.Thread(target=join)
    joining.start()
    assert rank.has_begun.wait(60)
    left_behind = [thread for thread in threading.enumerate() if thread.name == "join-1"]
    member.abort(1)
    joining.join(60)
    assert ended and member.epoch == 0
    rank.may_end.set()
    for thread in left_behind:
        thread.join(60)
        assert not thread.is_alive()
    assert rank.num_used == 0
    member.prepare(2)
    member.join(replace(form, epoch=2), ParallelConfig())
    assert rank.num_used == 1 and member.epoch == 2
    member.leave()
