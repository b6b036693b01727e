"""Who belongs to the cluster: registrations, leases that end, generations, a store that comes back empty."""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.actors.router_actor import changes_between
from cluster.commands.running import describe
from cluster.membership.membership import Membership, Registration, Tick
from cluster.store.store import Entry, Snapshot
from workers.status import Role, WorkerAddress


def worker(worker_id: str, generation: int = 1 << 32, role: Role = Role.DECODE, port: int = 1) -> Registration:
    return Registration(WorkerAddress(worker_id, generation, f"127.0.0.1:{port}"), role)


def state(*workers: Registration, epoch: str = "first") -> Snapshot:
    return Snapshot(epoch, tuple(Entry(w.key, w.encode(), at + 1) for at, w in enumerate(workers)))


def test_a_registration_reads_back() -> None:
    assert Registration.decode(worker("decode-0").encode()) == worker("decode-0")


JUNK = st.sampled_from(
    ["1e999", "-1", "0", "true", "NaN", "1.5", "9" * 300, "null", "[]", "{}", '""', "[" * 90_000, '{"a":' * 90_000]
)
GOOD = {"worker_id": '"x"', "generation": "4294967296", "target": '"127.0.0.1:1"', "role": '"decode"'}


def spoiled(field: str, value: str) -> str:
    """A registration with one field replaced."""
    return "{" + ", ".join(f'"{name}": {text}' for name, text in (GOOD | {field: value}).items()) + "}"


@settings(max_examples=int(os.environ.get("BATON_FUZZ_EXAMPLES", "200")))
@given(st.text() | JUNK | st.builds(spoiled, st.sampled_from(sorted(GOOD)), JUNK))
def test_a_strangers_entry_is_no_worker_and_no_error(text: str) -> None:
    membership = Membership(grace_s=4.0)
    good = worker("a")
    entries = (Entry(good.key, good.encode(), 1), Entry("workers/x", text, 1))
    assert membership.handle(Snapshot("first", entries), 0.0) == (good.address,)
    assert membership.refused == {"workers/x"}


def test_the_registration_that_was_spoiled_above_is_one() -> None:
    assert Registration.decode(spoiled("role", '"mixed"')) == worker("x", role=Role.MIXED)


def test_a_registration_under_another_workers_key_does_not_count() -> None:
    membership = Membership(grace_s=4.0)
    membership.handle(Snapshot("first", (Entry("workers/a", worker("b").encode(), 1),)), 0.0)
    assert membership.workers == ()


def test_members_come_and_go_with_their_leases() -> None:
    membership = Membership(grace_s=4.0)
    a, b = worker("a"), worker("b")
    assert membership.handle(state(b, a), 0.0) == (a.address, b.address)
    assert membership.handle(state(b, a), 1.0) is None, "no change, nothing to tell"
    assert membership.handle(state(b), 2.0) == (b.address,)
    assert membership.deadline is None


def test_a_new_start_takes_the_place_of_the_dead_one_at_once() -> None:
    membership = Membership(grace_s=4.0)
    membership.handle(state(worker("a", 1 << 32)), 0.0)
    back = worker("a", 2 << 32, port=2)
    assert membership.handle(state(back), 1.0) == (back.address,)


def test_an_emptied_store_removes_nobody_who_registers_again_in_time() -> None:
    membership = Membership(grace_s=4.0)
    a, b = worker("a"), worker("b")
    membership.handle(state(a, b), 0.0)
    assert membership.handle(state(epoch="second"), 10.0) is None
    assert membership.deadline == 14.0
    assert membership.handle(state(a, epoch="second"), 11.0) is None
    assert membership.handle(Tick(), 13.9) is None
    assert membership.handle(Tick(), 14.0) == (a.address,), "b did not come back"
    assert membership.deadline is None


def test_the_grace_ends_early_when_all_are_back() -> None:
    membership = Membership(grace_s=4.0)
    a = worker("a")
    membership.handle(state(a), 0.0)
    membership.handle(state(epoch="second"), 1.0)
    membership.handle(state(a, epoch="second"), 2.0)
    assert membership.deadline is None
    assert membership.handle(state(epoch="second"), 3.0) == (), "from here an ended lease counts again"


def test_a_second_loss_within_the_grace_keeps_both_groups() -> None:
    membership = Membership(grace_s=4.0)
    a, b = worker("a"), worker("b")
    membership.handle(state(a, b), 0.0)
    membership.handle(state(a, epoch="second"), 1.0)
    assert membership.handle(state(epoch="third"), 2.0) is None
    assert membership.addresses == (a.address, b.address)
    assert membership.handle(Tick(), 6.0) == ()


def test_a_store_that_stood_still_does_not_empty_the_cluster() -> None:
    """Every lease ended while it did; whoever is alive registers again."""
    membership = Membership(grace_s=4.0, doubt_s=40.0)
    workers = [worker(f"w-{index}") for index in range(5)]
    membership.handle(state(*workers), 0.0)
    assert membership.handle(state(), 10.0) is None and membership.deadline == 50.0
    assert membership.handle(state(*workers[:4]), 12.0) is None
    assert membership.handle(Tick(), 50.0) == tuple(w.address for w in workers[:4]), "one did not come back in time"
    assert membership.deadline is None


def test_leases_that_end_one_after_another_count_together() -> None:
    membership = Membership(grace_s=4.0, doubt_s=40.0)
    workers = [worker(f"w-{index}") for index in range(5)]
    membership.handle(state(*workers), 0.0)
    for number in (1, 2):
        membership.handle(state(*workers[number:]), 10.0 + number)
    assert membership.handle(state(*workers[3:]), 13.0) == tuple(w.address for w in workers), "who had gone is back"


def test_a_few_that_leave_are_not_missed() -> None:
    membership = Membership(grace_s=4.0, doubt_s=40.0)
    workers = [worker(f"w-{index}") for index in range(5)]
    membership.handle(state(*workers), 0.0)
    for number in range(1, 5):  # further apart than the grace
        left = tuple(w.address for w in workers[number:])
        assert membership.handle(state(*workers[number:]), 10.0 * number) == left
    assert membership.deadline is None


def test_the_log_says_what_changed_and_not_who_is_there() -> None:
    before = {f"w-{index}": worker(f"w-{index}") for index in range(1000)}
    after = {name: registration for name, registration in before.items() if name != "w-7"} | {"new": worker("new")}
    after["w-8"] = worker("w-8", generation=2 << 32)
    assert changes_between(before, after) == "new came, w-7 left, w-8 is new"
    assert changes_between(before, before) == "nothing has changed"


def test_the_operator_is_told_what_became_of_a_worker() -> None:
    before = worker("a", 1 << 32, Role.DECODE)
    assert describe("a", before, before) == ""
    assert describe("a", before, None) == "a is gone"
    assert describe("a", None, before) == "a is there: decode, generation 1970-01-01T00:00:01Z/0"
    assert describe("a", before, worker("a", (1 << 32) + 1, Role.MIXED)) == (
        "a switched from decode to mixed, generation 1970-01-01T00:00:01Z/1"
    )
    assert (
        describe("a", before, worker("a", 2 << 32)) == "a was started again: decode, generation 1970-01-01T00:00:02Z/0"
    )
