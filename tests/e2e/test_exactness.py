"""A fault or a switch never changes, loses or repeats a token: 200 mixed requests against the golden run of one process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from cluster_process import ClusterProcess, pools_in_use, wait_until
from conftest import NUM_WORKERS
from golden_jobs import Job
from openai import AsyncOpenAI

pytestmark = pytest.mark.timeout(400)

CONCURRENCY = 24


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reasons: list[str] = field(default_factory=list)
    trace: dict[str, Any] = field(default_factory=dict)


async def stream_all(url: str, jobs: list[Job], on_progress: Callable[[int], None], key: str) -> list[Answer]:
    """Streams every job, CONCURRENCY at once; `on_progress` hears the number of chunks so far."""
    slots = asyncio.Semaphore(CONCURRENCY)
    num_chunks = 0

    async def one(client: AsyncOpenAI, job: Job) -> Answer:
        nonlocal num_chunks
        answer = Answer()
        async with slots:
            stream = await client.completions.create(**job.body, stream=True)
            async for chunk in stream:
                num_chunks += 1
                on_progress(num_chunks)
                answer.trace = getattr(chunk, "baton", None) or answer.trace
                for choice in chunk.choices:
                    answer.text += choice.text
                    answer.tokens += getattr(choice, "token_ids", None) or []
                    answer.finish_reasons += [choice.finish_reason] if choice.finish_reason else []
        return answer

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=300) as client:
        return list(await asyncio.gather(*(one(client, job) for job in jobs)))


def run(
    cluster: ClusterProcess, jobs: list[Job], events: dict[int, Callable[[], None]] | None = None, key: str = "none"
) -> list[Answer]:
    """Runs all jobs; `events` happen on threads of their own once that many chunks have come."""
    waiting = dict(events or {})
    happened: list[asyncio.Future[None]] = []

    def on_progress(num_chunks: int) -> None:
        for at in [at for at in waiting if at <= num_chunks]:
            happened.append(asyncio.get_running_loop().run_in_executor(None, waiting.pop(at)))

    async def everything() -> list[Answer]:
        answers = await stream_all(cluster.url, jobs, on_progress, key)
        await asyncio.gather(*happened)
        return answers

    answers = asyncio.run(everything())
    assert not waiting, "not every event happened: the run was too short"
    return answers


def check(jobs: list[Job], answers: list[Answer]) -> None:
    """Every request ended once, with exactly its golden tokens and text."""
    for index, (job, answer) in enumerate(zip(jobs, answers, strict=True)):
        assert answer.tokens == job.golden, f"request {index} of {len(job.body['prompt'])} tokens"
        assert answer.text == job.text
        assert answer.finish_reasons == ["length"]


def test_the_pair_gives_the_tokens_of_a_single_process(cluster: ClusterProcess, jobs: list[Job]) -> None:
    answers = run(cluster, jobs)
    check(jobs, answers)
    reports = [answer.trace["choices"][0] for answer in answers]
    remote = [r for r in reports if r["transport"] != "local"]
    assert {r["transport"] for r in remote} == {"shm"}
    assert len(remote) > len(jobs) // 3
    assert {r["prefill_worker"] for r in remote} == {"prefill-0", "prefill-1"}
    assert {r["decode_worker"] for r in reports} == {"decode-0", "decode-1"}
    cluster.wait_idle(NUM_WORKERS)


def test_role_switches_in_the_middle_change_no_token(cluster: ClusterProcess, jobs: list[Job]) -> None:
    outcomes = []

    def switch(worker_id: str, role: str) -> Callable[[], None]:
        return lambda: outcomes.append(cluster.switch_role(worker_id, role))

    answers = run(cluster, jobs, {400: switch("decode-1", "prefill"), 1500: switch("prefill-0", "mixed")})
    check(jobs, answers)
    assert [o.returncode for o in outcomes] == [0, 0], outcomes
    workers = cluster.workers()
    assert (workers["decode-1"]["role"], workers["prefill-0"]["role"]) == ("prefill", "mixed")
    assert cluster.switch_role("decode-1", "decode").returncode == 0
    assert cluster.switch_role("prefill-0", "prefill").returncode == 0
    wait_until(lambda: cluster.workers()["decode-1"]["role"] == "decode", "decode-1 to be back")
    cluster.wait_idle(NUM_WORKERS)


@pytest.mark.parametrize("victim", ["decode-0", "prefill-1", "decode-1", "prefill-0"])
def test_a_killed_worker_changes_no_token_and_comes_back(cluster: ClusterProcess, jobs: list[Job], victim: str) -> None:
    # Work lasts for milliseconds, so a kill can come a moment too late to hit any; then it is done again.
    assert any(kill_in_the_middle(cluster, jobs, victim) for _ in range(3)), (
        f"{victim} never had work when it was killed"
    )


def kill_in_the_middle(cluster: ClusterProcess, jobs: list[Job], victim: str) -> bool:
    """Kills a worker that has work, checks every token and its return; True when work was lost and done again."""
    before = cluster.workers()[victim]
    replayed = cluster.get("/admin/status")["counters"].get("replayed_tokens", 0)

    def kill() -> None:
        wait_until(lambda: is_busy(cluster, victim), f"{victim} to have work")
        os.kill(before["pid"], signal.SIGKILL)

    answers = run(cluster, jobs, {chunks_before(victim, jobs): kill})
    check(jobs, answers)

    def is_back() -> bool:
        now = cluster.workers().get(victim)
        return now is not None and now["generation"] > before["generation"] and now["pid"] != before["pid"]

    wait_until(is_back, f"{victim} to be restarted")
    assert cluster.workers()[victim]["role"] == before["role"]
    cluster.wait_idle(NUM_WORKERS)
    if "decode" in victim:
        return bool(cluster.get("/admin/status")["counters"].get("replayed_tokens", 0) > replayed)
    return max(answer.trace["choices"][0]["attempts"] for answer in answers) > 1


def is_busy(cluster: ClusterProcess, worker_id: str) -> bool:
    load = cluster.workers()[worker_id]["load"]
    return bool(load["num_running"] + load["num_waiting"])


def chunks_before(victim: str, jobs: list[Job]) -> int:
    """When to strike: prompts are computed at the beginning, tokens all the time."""
    return 1 if "prefill" in victim else len(jobs)


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
def test_a_worker_that_hangs_and_wakes_again_changes_no_token(
    cluster: ClusterProcess, jobs: list[Job], victim: str
) -> None:
    """Stopped, it is neither dead nor alive; woken, it goes on with requests that others have taken over."""
    wait_until(lambda: victim in cluster.workers(), f"{victim} to be connected")
    pid = cluster.workers()[victim]["pid"]
    some = jobs[::2] if "prefill" in victim else jobs[1::2]  # not again what decode has in its caches

    def stop() -> None:
        wait_until(lambda: is_busy(cluster, victim), f"{victim} to have work")
        os.kill(pid, signal.SIGSTOP)

    try:
        answers = run(cluster, some, {chunks_before(victim, some): stop})
    finally:
        os.kill(pid, signal.SIGCONT)
    check(some, answers)
    cluster.wait_idle(NUM_WORKERS)
    assert cluster.workers()[victim]["pid"] == pid, "it was woken, not restarted"
    check(some[:20], run(cluster, some[:20]))


def test_afterwards_no_pool_of_a_dead_worker_is_left(cluster: ClusterProcess) -> None:
    cluster.wait_idle(NUM_WORKERS)
    alive = {worker["pid"] for worker in cluster.workers().values()}
    everyone = cluster.descendants()
    assert alive <= everyone
    # Mappings of dead peers go with the next tick of a worker.
    wait_until(
        lambda: len(pools_in_use(everyone)) == NUM_WORKERS,
        "one pool a worker",
        lambda: str((alive, pools_in_use(everyone))),
    )
    assert set().union(*pools_in_use(everyone).values()) == alive
    assert not [name for name in os.listdir("/dev/shm") if "baton" in name]
