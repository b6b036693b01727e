"""Looks at this host, the store, Ray and a router, for cluster.doctor.findings to judge. Changes nothing, but for one request that `ask` sends."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import shutil
import time
from contextlib import suppress
from pathlib import Path

import httpx

from cluster.config import ClusterConfig
from cluster.console.router_client import authorities
from cluster.doctor.findings import (
    Finding,
    HostFacts,
    fail,
    judge_answer,
    judge_clocks,
    judge_host,
    judge_port,
    judge_workers,
    ok,
    warn,
)
from cluster.doctor.ports import look_at_port
from router.config import RouterConfig
from router.requests.dispatch import UNBOUND_LOCAL_TOKENS
from workers.errors import BatonError
from workers.machine.limits import available_bytes, raise_file_limit, usable_cpus

ASK_TIMEOUT_S = 300.0
LOOK_TIMEOUT_S = 10.0
_SHORT_TOKENS = 128
_LONG_TOKENS = UNBOUND_LOCAL_TOKENS + 64
"""More than any decode worker is told to compute itself."""
_NUM_ANSWERED = 8


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def host_facts() -> HostFacts:
    from workers.model.native.build import KERNELS, supported

    sets = supported()
    return HostFacts(
        platform.python_version(),
        version_of("baton-serve"),
        version_of("ray"),
        version_of("torch"),
        tuple(each.name for each in sets if KERNELS.prebuilt(each).exists()),
        tuple(each.name for each in sets),
        usable_cpus(),
        available_bytes(),
        _shared_bytes(),
        raise_file_limit(),
        tuple(sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))),
        any(shutil.which(name) for name in ("g++", "c++", "clang++")),
    )


def look_at_host() -> list[Finding]:
    return judge_host(host_facts())


def look_at_ports(config: ClusterConfig | None) -> list[Finding]:
    """Those that routers and workers of this host are to listen at; without settings a router's usual one. KV takes any that is free."""
    from cluster.ray_session.running import clusters

    routers = [config.router_at(at) for at in range(config.pools.routers)] if config else [RouterConfig(model="unused")]
    wanted = [("router.port", each.host, each.port) for each in routers]
    if config is not None:
        wanted.append(("worker.port", config.worker.host, config.worker.port))
    pids = [each.pid for each in clusters()]
    return [judge_port(look_at_port(*each), pids) for each in dict.fromkeys(wanted) if each[2]]


def _shared_bytes() -> int:
    with suppress(OSError):
        found = os.statvfs("/dev/shm")
        return found.f_bavail * found.f_frsize
    return 0


async def look_at_store(config: ClusterConfig) -> list[Finding]:
    """Only a Redis: the store in an actor is looked at through the router."""
    if config.store.url == "memory":
        return []
    import redis.asyncio
    from redis.exceptions import RedisError

    from cluster.preflight import check_store
    from cluster.store.open import redis_options

    try:
        await check_store(config.store)
        client = redis.asyncio.Redis.from_url(
            config.store.url, **redis_options(config.store), socket_timeout=LOOK_TIMEOUT_S
        )
        try:
            seconds, micros = await client.time()
        finally:
            await client.aclose()
    except (BatonError, RedisError, OSError) as error:
        return [fail("store", str(error))]
    return [
        ok("store", f"Redis answers for cluster {config.store.cluster}"),
        judge_clocks(time.time(), seconds + micros / 1e6),
    ]


def look_at_ray(address: str = "") -> list[Finding]:
    """Whether its head listens: the one that is named (HOST:PORT), or else those of this user's clusters here."""
    from cluster.ray_session.running import clusters
    from cluster.ray_session.session import check_listens

    found = []
    named = [] if address in ("", "auto") else [address]
    for each in named or [cluster.ray_address for cluster in clusters()]:
        try:
            check_listens(each)
            found.append(ok("Ray", f"its head listens at {each}"))
        except BatonError as error:
            found.append(warn("Ray", f"{error}; workers serve on, but none that dies is started again"))
    return found


def look_at_router(url: str, admin_key: str) -> list[Finding]:
    """Its own health, and all workers as it sees them."""
    found = []
    with _client(url, LOOK_TIMEOUT_S) as client:
        try:
            health = client.get("/health")
        except httpx.HTTPError as error:
            return [fail("router", f"nobody answers at {url} ({error}); is it running, and is --url right?")]
        if health.status_code != 200:
            return [fail("router", f"{url}/health says {health.status_code}")]
        its = client.get("/version").json().get("version", "unknown")
        own = version_of("baton-serve")
        found.append(
            ok("router", f"{url} runs baton {its}")
            if its == own
            else warn("router", f"{url} runs baton {its}, this is {own}")
        )
        is_ready = client.get("/ready").status_code == 200
        found.append(ok("ready", "a request could run now") if is_ready else fail("ready", "no request could run now"))
        status = client.get("/admin/status", headers=_bearer(admin_key))
        if status.status_code == 200:
            found += judge_workers(status.json())
        else:
            found.append(
                warn("workers", f"/admin/status says {status.status_code}: give the admin key (--admin-key-file)")
            )
        text = client.get("/metrics", headers=_bearer(admin_key))
        if text.status_code == 200 and "baton_requests_total" in text.text:
            found.append(ok("metrics", f"{len(text.text.splitlines())} lines"))
        else:
            found.append(fail("metrics", f"/metrics says {text.status_code}"))
    return found


def ask(url: str, api_key: str, admin_key: str = "") -> list[Finding]:
    """One completion and one stream, as a client would. Where there are prefill workers the completion goes through one of them:
    its prompt is new, and longer than what decode workers compute themselves."""
    try:
        with _client(url, ASK_TIMEOUT_S) as client:
            prefill = _prefill_workers(client, admin_key)
            models = client.get("/v1/models", headers=_bearer(api_key))
            if models.status_code != 200:
                return [fail("request", f"/v1/models is answered with {models.status_code}: {models.text[:200]}")]
            room = int(models.json()["data"][0]["max_model_len"]) - _NUM_ANSWERED
            num_tokens = max(1, min(room, _LONG_TOKENS if prefill else _SHORT_TOKENS))
            prompt = [random.randrange(100, 1000) for _ in range(num_tokens)]
            body = {"prompt": prompt, "max_tokens": _NUM_ANSWERED, "temperature": 0, "ignore_eos": True}
            answer = client.post("/v1/completions", json={**body, "trace": True}, headers=_bearer(api_key))
            if answer.status_code != 200:
                return [fail("request", f"a completion is answered with {answer.status_code}: {answer.text[:200]}")]
            found = [judge_answer(answer.json(), prefill, num_tokens > UNBOUND_LOCAL_TOKENS)]
            chunks = 0
            with client.stream(
                "POST", "/v1/completions", json={**body, "stream": True}, headers=_bearer(api_key)
            ) as stream:
                last = ""
                for line in stream.iter_lines():
                    chunks += line.startswith("data:")
                    last = line or last
            whole = stream.status_code == 200 and last == "data: [DONE]"
            found.append(
                ok("stream", f"{chunks} chunks") if whole else fail("stream", f"it broke off after {chunks} chunks")
            )
            return found
    except httpx.HTTPError as error:
        return [fail("request", f"no answer: {error}")]


def _prefill_workers(client: httpx.Client, admin_key: str) -> frozenset[str]:
    """Those that only prefill, where an admin key tells; without such a pool prompts are computed where they are decoded."""
    status = client.get("/admin/status", headers=_bearer(admin_key))
    views = status.json()["workers"] if status.status_code == 200 else ()
    return frozenset(
        view["status"]["worker_id"] for view in views if view["connected"] and view["status"]["role"] == "prefill"
    )


def _client(url: str, timeout_s: float) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=timeout_s, trust_env=False, verify=authorities(url))


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}
