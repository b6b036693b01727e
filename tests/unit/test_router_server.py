"""A router server in its own thread: HTTP in front, a worker behind, and nothing left when it stops."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from byte_tokens import write_tokenizer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fake_worker import FakeWorker, golden_text

from cluster.settings import build
from router import https
from router.config import ApiConfig, RouterConfig
from router.driver import RouterDriver
from router.listening import bind
from router.server import RouterServer
from workers.errors import InvalidConfig, Refused
from workers.request import SamplingParams


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with a byte-level tokenizer."""
    write_tokenizer(tmp_path)
    return tmp_path


async def test_a_completion_walks_from_http_to_a_worker_and_back(checkpoint: Path) -> None:
    num_threads = threading.active_count()
    worker = FakeWorker("w-0")
    address = await worker.start()
    server = RouterServer(RouterConfig(str(checkpoint), port=0, tick_s=0.02), "router-0")
    url = await server.start()
    try:
        server.set_workers((address,))
        while not any(view.connected for view in server.status().workers):
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            body = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 5, "seed": 1}
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200
            request = worker.submits[0].request
            text = "".join(golden_text((6 * 31 + 17 + position * 7) % 1000) for position in range(5))
            assert request.prompt_token_ids == (1, 2, 3)
            assert answer.json()["choices"][0]["text"] == text
    finally:
        await server.stop()
        await worker.die()
    with pytest.raises(Refused):
        server.status()
    server.set_workers(())
    assert not [thread for thread in threading.enumerate() if thread.name == "router-router-0"]
    assert threading.active_count() <= num_threads + 3  # gRPC's poller and this loop's executor stay


async def test_what_goes_wrong_in_the_routers_thread_is_told_to_who_asks(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RouterServer(RouterConfig(str(checkpoint), port=0), "router-0")
    await server.start()
    try:

        def break_down(driver: RouterDriver) -> None:
            raise KeyError("a bug")

        monkeypatch.setattr(RouterDriver, "status", break_down)
        with pytest.raises(KeyError, match="a bug"):
            await asyncio.to_thread(server.status)
    finally:
        await server.stop()


@asynccontextmanager
async def serving(
    checkpoint: Path, **settings: float
) -> AsyncIterator[tuple[RouterServer, FakeWorker, httpx.AsyncClient]]:
    """A router that is connected to one worker, and a client of it."""
    worker = FakeWorker("w-0")
    address = await worker.start()
    server = RouterServer(RouterConfig(str(checkpoint), port=0, tick_s=0.02, **settings), "router-0")  # type: ignore[arg-type]
    try:
        url = await server.start()
        server.set_workers((address,))
        while not any(view.connected for view in server.status().workers):
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            yield server, worker, client
    finally:
        await server.stop()
        await worker.die()


def write_certificate(folder: Path, name: str = "localhost") -> tuple[Path, Path]:
    """A self-signed one and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    end, serial = now + timedelta(days=1), x509.random_serial_number()
    made = x509.CertificateBuilder(subject, subject, key.public_key(), serial, now, end).add_extension(
        x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False
    )
    files = folder / "cert.pem", folder / "key.pem"
    files[0].write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return files


async def test_https_is_served_a_unix_socket_besides_and_a_new_certificate_without_a_cut(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = write_certificate(checkpoint)
    uds = checkpoint / "http.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(uds))  # what a router that was killed leaves
    monkeypatch.setattr(https, "LOOK_S", 0.02)
    files = {"cert_file": str(cert), "key_file": str(key), "uds": str(uds)}
    server = RouterServer(RouterConfig(str(checkpoint), port=0, **files), "router-0")  # type: ignore[arg-type]
    url = (await server.start()).replace("127.0.0.1", "localhost")
    try:
        assert url.startswith("https://")

        async def ask(trusted: str) -> int:
            verify = ssl.create_default_context(cadata=trusted)
            async with httpx.AsyncClient(base_url=url, trust_env=False, verify=verify) as client:
                return (await client.get("/health")).status_code

        assert await ask(cert.read_text()) == 200
        with pytest.raises(InvalidConfig, match="cannot be used"):
            await RouterServer(RouterConfig(str(checkpoint), port=0, uds=str(uds)), "router-1").start()
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(uds))) as client:
            assert (await client.get("http://localhost/health")).status_code == 200
        old = cert.read_text()
        key.write_text("half of a new pair")
        new, _ = write_certificate(checkpoint)
        with pytest.raises(httpx.ConnectError):
            while True:
                assert await ask(old) == 200
        assert await ask(new.read_text()) == 200
    finally:
        await server.stop()
    assert not uds.exists()


@pytest.mark.parametrize("spoil", ["missing", "other key"])
async def test_a_certificate_that_cannot_be_used_is_a_setting_to_change(checkpoint: Path, spoil: str) -> None:
    cert, key = write_certificate(checkpoint)
    if spoil == "missing":
        cert.unlink()
    else:
        kept = cert.read_text()
        write_certificate(checkpoint)
        cert.write_text(kept)
    config = RouterConfig(str(checkpoint), port=0, cert_file=str(cert), key_file=str(key))
    with pytest.raises(InvalidConfig, match=r"router\.cert_file .* cannot be used"):
        await RouterServer(config, "router-0").start()


BODY = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 5, "seed": 1}


async def test_a_router_that_stops_lets_answers_finish_and_sends_new_requests_elsewhere(checkpoint: Path) -> None:
    async with serving(checkpoint) as (server, worker, client):
        worker.steps = asyncio.Semaphore(2)
        async with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as stream:
            lines = stream.aiter_lines()
            first = await anext(lines)
            whole = asyncio.create_task(client.post("/v1/completions", json=BODY))
            while len(worker.submits) < 2:
                await asyncio.sleep(0.01)
            stopping = asyncio.create_task(server.stop())
            while (await client.get("/ready")).status_code == 200:
                await asyncio.sleep(0.01)
            assert (await client.get("/health")).status_code == 200
            refused = await client.post("/v1/completions", json=BODY)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
            assert int(refused.headers["retry-after"]) >= 1 and refused.headers["x-should-retry"] == "true"
            assert not stopping.done() and len(worker.submits) == 2
            for _ in range(10):
                worker.steps.release()
            text = "".join(golden_text((6 * 31 + 17 + position * 7) % 1000) for position in range(5))
            rest = [first, *[line async for line in lines if line]]
            pieces = [
                json.loads(line.removeprefix("data: "))
                for line in rest
                if line[:6] == "data: " and "[DONE]" not in line
            ]
            assert "".join(piece["choices"][0]["text"] for piece in pieces) == text
            answer = await whole
            assert answer.json()["choices"][0]["text"] == text and answer.headers["connection"] == "close"
        await stopping


async def test_what_does_not_finish_in_time_ends_with_an_error(checkpoint: Path) -> None:
    async with serving(checkpoint, shutdown_timeout_s=0.05) as (server, worker, client):
        worker.steps = asyncio.Semaphore(2)
        async with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as stream:
            lines = stream.aiter_lines()
            assert (await anext(lines)).startswith("id: ") and (await anext(lines)).startswith("data: ")
            await server.stop()
            rest = [line async for line in lines if line]
        assert "shutting_down" in rest[-2] and rest[-1] == "data: [DONE]"


async def test_a_connection_stays_open_between_requests_for_as_long_as_configured(checkpoint: Path) -> None:
    async def is_closed_within(seconds: float, client: httpx.AsyncClient) -> bool:
        """Whether the server closes an idle connection that has had an answer."""
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"}")
        try:
            async with asyncio.timeout(seconds):
                return await reader.read() == b""
        except TimeoutError:
            return False
        finally:
            writer.close()

    async with serving(checkpoint) as (_, _, client):
        assert not await is_closed_within(6.0, client), "uvicorn's own default is 5 s"


async def test_a_port_that_is_taken_is_a_setting_to_change(checkpoint: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidConfig, match=f"router.port {port} cannot be used"):
            await RouterServer(RouterConfig(str(checkpoint), port=port), "router-0").start()


async def test_a_router_that_shares_a_port_takes_no_connection_before_it_has_a_worker(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.server.FIRST_WORKER_S", 3600)
    worker = FakeWorker("w-0")
    with bind("127.0.0.1", 0, share_port=True) as kept:
        port = kept.getsockname()[1]
        server = RouterServer(RouterConfig(str(checkpoint), port=port, share_port=True), "router-0")
        url = await server.start()
        try:
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
            server.set_workers((await worker.start(),))
            await server.until_ready()
            async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
                assert (await client.get("/ready")).status_code == 200
        finally:
            await server.stop()
            await worker.die()


async def test_defaults_that_name_tokens_the_model_does_not_have_are_a_setting_to_change(checkpoint: Path) -> None:
    api = ApiConfig(sampling_defaults=SamplingParams(stop_token_ids=(9999,)))
    with pytest.raises(InvalidConfig, match=r"sampling_defaults\.stop_token_ids needs token ids below 257"):
        await RouterServer(RouterConfig(str(checkpoint), port=0, api=api), "router-0").start()


@pytest.mark.parametrize(
    ("setting", "value"), [("max_queue", 0), ("policy", "best"), ("port", 70000), ("worker_stale_s", 0), ("model", "")]
)
def test_a_setting_that_cannot_work_is_named(setting: str, value: object) -> None:
    with pytest.raises(InvalidConfig, match=f"router.{setting} "):
        build(RouterConfig, {"model": "m", setting: value}, "router")
