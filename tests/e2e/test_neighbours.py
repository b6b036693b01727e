"""The extreme of every field of every body, beside a client that streams: its tokens are its own, and no process ends."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from cluster_process import MODEL, ClusterProcess
from openai import OpenAI
from test_bench_serve import load
from test_exhausted_hosts import router_pid

pytestmark = pytest.mark.timeout(290)

ANSWERS = {200, 400, 404, 413, 429, 503}
PATIENCE_S = 4.0
"""Then a client hangs up: what a request does to others is done by then, and what it holds is to be freed."""


class Victim:
    """Streams the same answer again and again until `stop`; `texts` are those that came."""

    def __init__(self, url: str) -> None:
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=50)
        self.golden = self.text()
        self.texts: list[str] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def text(self) -> str:
        stream = self._client.completions.create(
            model=MODEL.name,
            prompt="A long story",
            max_tokens=400,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return "".join(choice.text for chunk in stream for choice in chunk.choices)

    def _run(self) -> None:
        while not self._is_over.is_set():
            self.texts.append(self.text())

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()


def test_no_request_of_any_size_changes_a_neighbours_tokens_or_ends_a_process(cluster: ClusterProcess) -> None:
    workers = cluster.workers()
    before = router_pid(cluster), {name: (status["pid"], status["generation"]) for name, status in workers.items()}
    model = next(iter(workers.values()))["model"]
    cases = list(load("extreme_requests").cases(model["vocab_size"], model["max_model_len"]))
    answers: dict[str, int | str] = {}
    with httpx.Client(base_url=cluster.url, timeout=httpx.Timeout(60.0, read=PATIENCE_S)) as client:

        def send(place: int) -> None:
            case = cases[place]
            body, headers = json.dumps(case.body).encode(), {"content-type": "application/json"}
            try:
                answers[f"{case.path} {case.name}"] = client.post(case.path, content=body, headers=headers).status_code
            except httpx.ReadTimeout:
                answers[f"{case.path} {case.name}"] = "hung up"

        victim = Victim(cluster.url)
        try:
            with ThreadPoolExecutor(4) as senders:
                list(senders.map(send, range(len(cases))))
        finally:
            victim.stop()
    wrong = {name: answer for name, answer in answers.items() if answer not in (*ANSWERS, "hung up")}
    assert not wrong and len(answers) == len(cases)
    assert victim.texts and set(victim.texts) == {victim.golden}
    cluster.wait_idle(len(workers))
    now = {name: (status["pid"], status["generation"]) for name, status in cluster.workers().items()}
    assert (router_pid(cluster), now) == before
