"""The chart's pods as it renders them, run by a pod runner (pod_runner.py): installed, upgraded and drained under load, rolled back, uninstalled."""

from __future__ import annotations

import base64
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from chart_release import NAMESPACE, Release
from chart_render import Object
from pod_network import why_not
from pod_runner import PodRunner, hooks
from pod_streams import ApiClient, Streams

pytestmark = pytest.mark.timeout(3000)

QUESTION = {"model": "ernie-4.5-tiny", "messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}
STORIES = [
    {"model": "ernie-4.5-tiny", "prompt": f"{beginning} story", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    for beginning in ("A long", "Another", "The last")
]
COMPONENT = "app.kubernetes.io/component"
AT_ONCE = 3
LEAST_STREAMS, MANY_STREAMS = 30, 200
STARTED_S, ROLLED_S, ENDED_S = 900, 900, 600
"""A slow host takes minutes for what others do in seconds; nothing is waited for longer than it takes."""
SETTING = "config.start_timeout_s=700"
REDIS = ("baton-redis", "baton-secrets")
"""What is left for the cleanup to work on, as an external Redis and its password would be."""


@pytest.fixture
def release() -> Iterator[Release]:
    made = Release(
        "cpu-tryout",
        4,
        "pools.decode.replicas=2",
        "routers.replicas=2",
        "routers.endpointSeconds=1",
        "config.roles.mode=off",
        "rayHead.dashboard=false",
        "poolDefaults.worker.kv_memory_bytes=60MiB",
        "poolDefaults.worker.local_prefill_tokens=0",
        "routers.router.max_local_prefill_tokens=0",
    )
    yield made
    made.close()


@pytest.fixture
def runner() -> Iterator[PodRunner]:
    if reason := why_not():
        pytest.skip(reason)
    made = PodRunner(NAMESPACE)
    yield made
    made.close()


@pytest.fixture
def threads(runner: PodRunner) -> Iterator[ThreadPoolExecutor]:
    """Of somebody who is no pod of the release."""
    with runner.network.clients(AT_ONCE + 1) as made:
        yield made


def secret(objects: list[Object], name: str, key: str) -> str:
    (found,) = (each for each in objects if each["kind"] == "Secret" and each["metadata"]["name"] == name)
    return base64.b64decode(found["data"][key]).decode()


def only(objects: list[Object], hook: str, *kinds: str) -> list[Object]:
    return [each for each in objects if hook in hooks(each) and (not kinds or each["kind"] in kinds)]


def is_reached(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "is_long", [False, pytest.param(True, id="long", marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_streams_outlive_everything_that_an_operator_does(
    release: Release, runner: PodRunner, threads: ThreadPoolExecutor, is_long: bool
) -> None:
    """The long one has another image besides, goes back to the first settings, and sees 200 streams."""
    objects = release.upgrade()
    runner.apply(objects)
    runner.wait_settled(STARTED_S)

    # What `helm test` runs; then one request's way: through one pod of each pool, over the network.
    (tested,) = only(objects, "test", "Pod")
    test_pod = runner.run_pod(tested, "baton-test", ENDED_S)
    assert test_pod.phase == "Succeeded", test_pod.said()
    assert re.search(r"prefill on baton-prefill-\S+, decode on baton-decode-", test_pod.said()), test_pod.said()
    keys = (secret(objects, "baton-keys", "api-keys"), secret(objects, "baton-keys", "admin-keys"))
    client = ApiClient(runner.address_of("baton"), 8000, *keys)
    answer = threads.submit(client.ask, "/v1/chat/completions", {**QUESTION, "trace": True}).result()
    (way,) = answer["baton"]["choices"]
    assert way["prefill_worker"] in {pod.name for pod in runner.named("baton-prefill")}
    assert way["decode_worker"] in {pod.name for pod in runner.named("baton-decode")}
    assert way["transport"] == "tcp", way

    # NetworkPolicies: from outside routers are reached and nothing else, though everything listens.
    redis, head = runner.pods["baton-redis-0"], runner.pods["baton-ray-0"]
    worker = runner.named("baton-decode")[0]
    listening = {(redis.address, 6379), (head.address, 6379), (worker.address, 8081)}
    assert {at for at in listening if threads.submit(is_reached, at).result()} == set()
    assert {at for at in listening if runner.from_node(is_reached, at)} == listening

    streams = Streams(client, STORIES, threads, AT_ONCE)
    streams.start()
    try:
        # A setting of all processes changes: every pod but Redis' is replaced.
        runner.apply(release.upgrade(SETTING))
        runner.wait_settled(ROLLED_S)
        assert release.revisions[0] != release.revisions[1] and runner.pods["baton-redis-0"] is redis
        assert {pod.name for pod in runner.gone} >= {worker.name, head.name}

        # Every process of two pods is killed, and kubelet starts their containers again: the head goes on from its tables.
        # (A slow host's probes may have started one again before.)
        killed = {pod: pod.restarts for pod in (runner.pods["baton-ray-0"], runner.named("baton-decode")[0])}
        for pod in killed:
            pod.crash()
        runner.wait(
            lambda: all(pod.restarts > before and pod.is_ready for pod, before in killed.items()),
            STARTED_S,
            "the killed pods are back",
        )

        # A node is drained, with the head, a router and workers on it.
        node = runner.pods["baton-ray-0"].node
        runner.drain(node, ROLLED_S)
        runner.wait_settled(STARTED_S)
        runner.uncordon(node)

        settings = [SETTING]
        if is_long:  # every pod but Redis' is replaced again
            settings.append("image.tag=next")
            runner.apply(release.upgrade(*settings))
            runner.wait_settled(ROLLED_S)
        for replicas in (4, 1):
            runner.apply(release.upgrade(*settings, f"pools.decode.replicas={replicas}"))
            runner.wait_settled(STARTED_S)

        runner.apply(release.rollback(1 if is_long else 2))
        runner.wait_settled(ROLLED_S)
        if is_long:
            runner.wait(
                lambda: streams.num_done >= MANY_STREAMS or bool(streams.faults), 1800, "200 streams have ended"
            )
    finally:
        streams.finish()
    assert not streams.faults, "\n".join([*streams.faults, runner.everything()])
    assert streams.num_done >= LEAST_STREAMS, streams.num_done

    # Uninstalled, but for Redis, which stands for an external one: every pod ends by itself in its time, and takes its names along.
    # A stream that runs is served to its end.
    last = threads.submit(client.stream, STORIES[0])
    runner.wait(lambda: threads.submit(is_running, client).result(), STARTED_S, "a stream runs")
    left = [each for each in objects if each["metadata"]["name"] in REDIS and each["kind"] != "NetworkPolicy"]
    runner.apply(left)
    runner.wait(lambda: set(runner.pods) == {redis.name}, ENDED_S, "all pods but Redis' have ended")
    assert last.result() == streams.golden[0]
    ended = {pod.name: pod for pod in runner.gone}
    late = [name for name, pod in ended.items() if pod.was_killed]
    # (A worker whose head went first ends with its node, and not with 0.)
    faulty = [name for name, pod in ended.items() if pod.exit_codes[-1] != 0 and pod.labels[COMPONENT] != "worker"]
    assert not late + faulty, f"{late} {faulty}\n{runner.everything()}"
    assert len(ended) >= 15

    def names_left() -> list[str]:
        """Those of the role controller stay for the next one."""
        return [key for key in stored(runner) if any(key.endswith(name) for name in ended) and "control/" not in key]

    # A worker that ends while it loads leaves its word on that to its lease.
    runner.wait(lambda: not names_left(), ENDED_S, "the last leases have run out")
    assert stored(runner)

    external = ("redis.enabled=false", "redis.external.host=baton-redis", "redis.external.passwordSecret=baton-secrets")
    cleanup = only(release.render(*external), "post-delete")
    runner.add(each for each in cleanup if each["kind"] != "Job")
    (job,) = (each for each in cleanup if each["kind"] == "Job")
    done = runner.run_pod(job["spec"]["template"], "baton-cleanup", ENDED_S)
    assert done.phase == "Succeeded", done.said()
    assert not stored(runner)

    runner.apply([])
    runner.wait(lambda: not runner.pods, ENDED_S, "Redis has ended")
    assert not redis.was_killed and redis.exit_codes == [0], "Redis heard no SIGTERM"


def is_running(client: ApiClient) -> bool:
    """By one of the routers, whichever answers."""
    return bool(client.ask("/admin/status", kind="admin")["num_running"])


def stored(runner: PodRunner) -> list[str]:
    """All keys in Redis."""
    ask = 'REDISCLI_AUTH="$(cat /secrets/redis-password)" redis-cli --scan'
    return runner.pods["baton-redis-0"].execute(["sh", "-c", ask]).split()
