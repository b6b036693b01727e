"""Whoever can write to Redis, and knows nothing more, neither names workers nor keeps the cluster's own from being heard."""

from __future__ import annotations

import asyncio
import os
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis_server import RedisServer

from cluster.membership.membership import Registration, desired_role
from cluster.membership.registration import Registrar, number_start
from cluster.preflight import check_store
from cluster.secret_files import make_secret, read_secret
from cluster.store.open import open_store
from cluster.store.redis_store import RedisStore
from cluster.store.signed import SignedStore
from cluster.store.store import Entry, Store, StoreConfig
from workers.errors import InvalidConfig
from workers.status import Role, WorkerAddress

SECRET = "a secret of sixteen characters and more"
BOUND_S = 30.0
KEY = "workers/decode-0"
EVIL = Registration(WorkerAddress("decode-0", 2**62, "10.6.6.6:6666"), Role.DECODE)


class Attacked:
    """A signed store, and a client that writes to the same Redis what it likes."""

    def __init__(self, server: RedisServer) -> None:
        self.cluster = uuid.uuid4().hex
        self.pending: list[str] = []
        self.raw = RedisStore(server.url, self.cluster)
        self.store = SignedStore(self.raw, SECRET, self.pending.append)
        self.attacker: Any = redis.Redis.from_url(server.url)
        self.space = f"baton:{{{self.cluster}}}:"

    def entry(self, key: str) -> str:
        return f"{self.space}entry:{key}"

    def plant(self, key: str, value: bytes | str, version: bytes | str = b"7") -> None:
        self.attacker.delete(self.entry(key))
        self.attacker.hset(self.entry(key), mapping={"value": value, "version": version})
        self.attacker.zadd(f"{self.space}names", {key: 0})


@pytest.fixture
async def attacked(redis_server: RedisServer) -> AsyncIterator[Attacked]:
    attacked = Attacked(redis_server)
    yield attacked
    await attacked.store.close()
    attacked.attacker.close()


async def start(store: Store, now_s: float = 1000.0) -> Registrar:
    """What a worker does at its start; it must succeed whatever stands in the store."""
    async with asyncio.timeout(BOUND_S):
        number = await number_start(store, "decode-0", now_s)
        role = await desired_role(store, "decode-0", Role.DECODE)
        address = WorkerAddress("decode-0", number << 32, "127.0.0.1:1")
        registrar = Registrar(store, Registration(address, role), Role.DECODE, number, 60.0)
        await registrar.register()
    return registrar


async def read(store: Store) -> list[Entry]:
    return list((await store.list("workers/")).entries)


async def test_what_the_attacker_writes_names_no_worker_no_role_and_no_start(attacked: Attacked) -> None:
    attacked.plant(KEY, EVIL.encode())
    attacked.plant("workers/decode-9", EVIL.encode())
    attacked.plant("starts/decode-0", "not a number")
    attacked.plant("roles/decode-0", "prefill")
    registrar = await start(attacked.store)
    assert [entry.value for entry in await read(attacked.store)] == [registrar.registration.encode()]
    assert registrar.registration.role is Role.DECODE
    named = [
        key for key in (KEY, "workers/decode-9", "starts/decode-0", "roles/decode-0") if key in str(attacked.pending)
    ]
    assert len(named) == 4 and len(attacked.pending) == 4, "each is named once"
    assert attacked.store.num_refused > 4 and SECRET not in str(attacked.pending)


async def test_an_entry_moved_to_another_key_does_not_count(attacked: Attacked) -> None:
    await start(attacked.store)
    signed = attacked.attacker.hget(attacked.entry(KEY), "value")
    attacked.plant("workers/decode-1", signed)
    assert [entry.key for entry in await read(attacked.store)] == [KEY]


async def test_a_deleted_registration_is_back_with_the_next_heartbeat(attacked: Attacked) -> None:
    registrar = await start(attacked.store)
    quick = Registrar(attacked.store, registrar.registration, Role.DECODE, 1000, 1.0)
    await quick.register()
    running = asyncio.create_task(quick.run())
    attacked.attacker.flushdb()
    async with asyncio.timeout(BOUND_S), aclosing(attacked.store.watch("workers/")) as snapshots:
        async for snapshot in snapshots:
            if [entry.key for entry in snapshot.entries] == [KEY]:
                break
    running.cancel()


SPOILED: dict[str, Callable[[Any, str], object]] = {
    "the entry is a text": lambda client, space: client.set(f"{space}entry:{KEY}", "x"),
    "the entry is a list": lambda client, space: (
        client.delete(f"{space}entry:{KEY}"),
        client.lpush(f"{space}entry:{KEY}", "x"),
    ),
    "the entry has no version": lambda client, space: client.hdel(f"{space}entry:{KEY}", "version"),
    "the version is no number": lambda client, space: client.hset(f"{space}entry:{KEY}", "version", "1e999"),
    "the version is huge": lambda client, space: client.hset(f"{space}entry:{KEY}", "version", "9" * 300),
    "the value is 20 MB": lambda client, space: client.hset(f"{space}entry:{KEY}", "value", b"[" * 20_000_000),
    "the value is no text": lambda client, space: client.hset(f"{space}entry:{KEY}", "value", b"\xff\xfe\x00"),
    "the index is a text": lambda client, space: client.set(f"{space}names", "x"),
    "the index holds bytes": lambda client, space: client.zadd(f"{space}names", {b"workers/\xff": 0}),
    "the revision is a list": lambda client, space: (
        client.delete(f"{space}revision"),
        client.lpush(f"{space}revision", "x"),
    ),
    "the revision is at its end": lambda client, space: client.set(f"{space}revision", 2**63 - 1),
    "the revision is no number": lambda client, space: client.set(f"{space}revision", "many"),
    "the epoch is a list": lambda client, space: (client.delete(f"{space}epoch"), client.lpush(f"{space}epoch", "x")),
    "the epoch is 20 MB": lambda client, space: client.set(f"{space}epoch", b"x" * 20_000_000),
    "messages are no text": lambda client, space: client.publish(f"{space}changes", b"workers/\xff\xfe"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
async def test_a_spoiled_redis_keeps_no_worker_from_registering_and_no_router_from_hearing_of_it(
    attacked: Attacked, spoiled: str
) -> None:
    await start(attacked.store)
    async with asyncio.timeout(BOUND_S), aclosing(attacked.store.watch("workers/")) as snapshots:
        await anext(snapshots)
        SPOILED[spoiled](attacked.attacker, attacked.space)
        again = await start(attacked.store, now_s=2000.0)
        async for snapshot in snapshots:
            if [entry.value for entry in snapshot.entries] == [again.registration.encode()]:
                return
    raise AssertionError("the watch ended")


@settings(
    max_examples=int(os.environ.get("BATON_FUZZ_EXAMPLES", "60")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
)
@given(
    st.binary(max_size=200) | st.sampled_from([b"[" * 60_000, b'{"a":' * 12_000, EVIL.encode().encode()]),
    st.binary(max_size=40),
)
def test_bytes_of_any_kind_are_skipped(redis_server: RedisServer, value: bytes, version: bytes) -> None:
    async def story() -> None:
        attacked = Attacked(redis_server)
        attacked.plant("workers/x", value, version)
        registrar = await start(attacked.store)
        assert [entry.value for entry in await read(attacked.store)] == [registrar.registration.encode()]
        await attacked.store.close()
        attacked.attacker.close()

    asyncio.run(story())


async def test_user_and_password_come_from_a_file_and_appear_nowhere(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--user", "baton", "on", "~*", "&*", "+@all", ">hunter2", "--user", "default", "off")
    server.start()
    try:
        password, secret = tmp_path / "password", tmp_path / "secret"
        make_secret(str(secret))
        password.touch(mode=0o600)
        password.write_text("hunter2\n")
        config = StoreConfig(url=server.url, username="baton", password_file=str(password), secret_file=str(secret))
        await check_store(config)
        store = open_store(config, "baton")
        await start(store)
        assert len(await read(store)) == 1
        await store.close()
        password.write_text("wrong-one")
        with pytest.raises(InvalidConfig) as refused:
            await check_store(config)
        assert "wrong-one" not in str(refused.value) and "hunter2" not in repr(config) + str(refused.value)
    finally:
        server.stop()


async def test_a_certificate_of_another_authority_is_refused(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
             "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
             "-keyout", f"{name}.key", "-out", f"{name}.pem"],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip
    # No server here speaks TLS of its own: the client's settings are what is tested, on a listener of Python's.
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ours.pem", tmp_path / "ours.key")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readline():  # "*2": a command of two words, each of a length and a text
            words = [await reader.readline() for _ in range(2 * int(head[1:]))][1::2]
            writer.write(b"+PONG\r\n" if words[0].strip().upper() == b"PING" else b"+OK\r\n")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    url = f"rediss://127.0.0.1:{port}/0"
    await check_store(StoreConfig(url=url, ca_file=str(tmp_path / "ours.pem")))
    with pytest.raises(InvalidConfig, match=r"(?i)certificate"):
        await check_store(StoreConfig(url=url, ca_file=str(tmp_path / "theirs.pem")))
    server.close()


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    make_secret(str(path))
    assert len(read_secret(str(path), "store.secret_file", 16)) == 64
    path.chmod(0o640)
    with pytest.raises(InvalidConfig, match="chmod 600"):
        read_secret(str(path), "store.secret_file")
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(InvalidConfig, match="no file"):
        read_secret(str(tmp_path / "fifo"), "store.secret_file")
    with pytest.raises(InvalidConfig, match=r"store\.secret_file.*cannot be read"):
        read_secret(str(tmp_path / "nothing"), "store.secret_file")
    (tmp_path / "short").touch(mode=0o600)
    with pytest.raises(InvalidConfig, match="at least 16"):
        read_secret(str(tmp_path / "short"), "store.secret_file", 16)
