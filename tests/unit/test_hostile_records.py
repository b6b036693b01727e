"""Whatever stands in the store under the names of our entries, or in a file of usage: what is no record is skipped and named, and ends nobody."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from roles_story import RolesStory, demand, fleet

from cluster.membership.membership import WORKERS, Registration
from cluster.roles import records
from cluster.roles.config import RolesConfig
from cluster.roles.events import StoreSeen
from cluster.roles.switches import Phase, RoleSwitch
from cluster.store.memory import MemoryStore
from cluster.store.store import Entry, Snapshot
from cluster.tenants.driver import TenantsDriver
from cluster.tenants.records import KEYS, decode_key, encode_key
from router.roles import Order
from router.tenants.config import TenantsConfig
from router.tenants.roster import Key
from router.tenants.usage import Usage, totals, usage_of
from workers.status import Role, WorkerAddress

SWITCH = RoleSwitch("n", "decode-0", Role.DECODE, Role.PREFILL, 1, "a reason", phase=Phase.DONE, at_s=1e9)
WRITTEN: dict[str, tuple[str, Callable[[str], object]]] = {
    WORKERS: (
        Registration(WorkerAddress("decode-0", 1 << 32, "127.0.0.1:1"), Role.DECODE).encode(), Registration.decode
    ),
    KEYS: (encode_key(Key("k", "acme", bytes(32), 5.0)), lambda text: decode_key(Entry(f"{KEYS}k", text, 1))),
    records.SWITCHES: (records.encode(SWITCH), records.switch_of),
    records.DEMANDS: (records.encode(demand(3.0)), records.demand_of),
    records.ORDERS: (
        records.encode({"name": "order-1", "order": asdict(Order("decode-0", Role.PREFILL))}), records.order_of
    ),
    "usage": (Usage(1.0, "r", "t", "k", "/v1/completions", "m", "ok", 1, 0, 1, None, 0.1).line(), usage_of),
}  # fmt: skip
"""By kind of record: a good one as it is written, and what reads it."""

HUGE = "1" + "0" * 400
JUNK = st.sampled_from(
    [HUGE, "-1", "1e999", "NaN", "-Infinity", "true", "null", "[]", "{}", '""', '"1e999"', "[[1]]", "1e300", '["a"]',
     "1.5", "9" * 5000, "[" * 20_000, '{"a":' * 20_000]
)  # fmt: skip


def spoiled(name: str, at: int, value: str) -> str:
    """A record with one field, at any depth, replaced."""
    written: Any = json.loads(WRITTEN[name][0])
    inner = written["order"] if name == records.ORDERS and at % 2 else written
    fields = list(inner)
    inner[fields[at // 2 % len(fields)]] = "@"
    return json.dumps(written).replace('"@"', value)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_reads_back(name: str) -> None:
    text, read = WRITTEN[name]
    assert read(text) is not None and read("{}") is None


@settings(max_examples=int(os.environ.get("BATON_FUZZ_EXAMPLES", "300")), deadline=None)
@given(
    st.sampled_from(sorted(WRITTEN)).flatmap(
        lambda name: st.tuples(st.just(name), st.text() | st.builds(spoiled, st.just(name), st.integers(0, 99), JUNK))
    )
)
@example((KEYS, spoiled(KEYS, 4, HUGE)))
@example((records.SWITCHES, spoiled(records.SWITCHES, 26, '"x"')))
@example((records.DEMANDS, spoiled(records.DEMANDS, 2, '["a"]')))
@example(("usage", spoiled("usage", 0, HUGE)))
@example((records.ORDERS, spoiled(records.ORDERS, 1, '""')))
def test_no_text_under_any_name_ends_who_reads_it(named: tuple[str, str]) -> None:
    """Those who lead roles go on deciding; an order that is one, though nobody gave it, may be carried out."""
    name, text = named
    record = WRITTEN[name][1](text)
    if name == "usage":
        totals([record] if isinstance(record, Usage) else [], "tenant")
        return
    story = RolesStory(fleet(2, 2), config=RolesConfig(mode="auto"), load=demand(3.0))
    for prefix in (*WRITTEN, records.AUDIT, records.DECISIONS, records.ANSWERS, records.PINS):
        story.store.put(f"{prefix}decode-0", text, None)
    story.run(1.0)
    assert story.leader == "router-0"
    if isinstance(record, RoleSwitch) and record.worker_id != "decode-0":
        record = None  # it stands under another worker's name
    if isinstance(record, tuple) and record[1].worker_id != "decode-0":
        record = None
    is_named = any(f"{name}decode-0" in said for said in story.said)
    assert is_named == (record is None and name in (records.SWITCHES, records.DEMANDS, records.ORDERS))


def test_what_is_refused_is_named_once() -> None:
    story = RolesStory(fleet(1, 1))
    entries = (Entry(f"{records.SWITCHES}decode-0", "no switch", 1),)
    said = [
        command
        for _ in range(3)
        for command in story.cores["router-0"].handle(StoreSeen(Snapshot("1", entries)), 0.0)
        if "is no record of roles" in str(command)
    ]
    assert len(said) == 1 and story.cores["router-0"].mirror.refused == {entries[0].key}


async def test_a_key_that_is_none_is_named_once_and_the_others_count(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    await store.put(f"{KEYS}evil", spoiled(KEYS, 4, HUGE))
    await store.put(f"{KEYS}good", encode_key(Key("good", "acme", bytes(32))))
    driver, told = TenantsDriver(TenantsConfig(enabled=True), store), []

    class Router:
        def set_tenants(self, tenants: object, keys: list[Key]) -> None:
            told.append([key.key_id for key in keys])

    for _ in range(3):
        await driver.prepare(Router())
    assert told == [["good"]] * 3 and driver.refused == {f"{KEYS}evil"}
    assert caplog.text.count("is no key of a tenant") == 1
