"""A Backend without workers: it plays scripted outputs, refuses on demand and records what was submitted and cancelled."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
from llguidance import LLMatcher

from router.api.app import create_app
from router.backend import ListedRouter, LoadingWorker, Lookout, RouterStatus, WorkerView
from router.config import ApiConfig, HttpConfig
from router.forecast.forecasts import ForecastStatus
from router.forecast.steps import KindForecast
from router.http_server import HttpServer
from router.job_part import NO_JOB, FoundJob, JobPart
from router.policies.explain import Decision
from router.policies.policy import Reason
from router.requests.journal import Way, is_called
from router.roles import RolesReport, SwitchCount
from router.tenants.tenancy import Tenancy
from router.tenants.usage_log import UsageLog
from router.wishes import NO_WISHES, Wishes
from workers.errors import InvalidRequest
from workers.grammar.language import engine_name
from workers.grammar.sequence_constraint import SequenceConstraint
from workers.grammar.vocabulary import GrammarVocabulary
from workers.request import FinishReason, HandoffReport, Output, Request
from workers.sampling.constraint import tokens_in
from workers.status import Load, ModelInfo, RankStatus, Role, WorkerStatus
from workers.text.tokenizer import IncrementalDetokenizer, Tokenizer
from workers.token_logprobs import PromptScores, TokenLogprob

CHECKPOINT = Path(__file__).parents[2] / "models" / "ernie-4.5-tiny"
DECISION = Decision("kv_aware", "decode-0", ("prefill-0",), Reason.LEAST_COST, False, 0.5, 0.25, 0.02, 1, 1, (), ())
MODEL = ModelInfo(
    "ernie-tiny", "fingerprint", vocab_size=1408, max_model_len=512, block_size=16, grammars=engine_name()
)
WORDS = (" the", " is", " a", "é", "你", "好", "\n", "7", " day")
"""What the fake says; several of these are tokens that end inside a character."""


class Hang:
    """A step that does not come: the stream waits until it is closed, or until a test releases it, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_released = False
        self._waiting: list[tuple[asyncio.AbstractEventLoop, Callable[[], None]]] = []

    def release(self) -> None:
        with self._lock:
            self._is_released = True
            for loop, wake in self._waiting:
                loop.call_soon_threadsafe(wake)

    def wake_when_released(self, wake: Callable[[], None]) -> bool:
        """False: it is released already."""
        with self._lock:
            if not self._is_released:
                self._waiting.append((asyncio.get_running_loop(), wake))
            return not self._is_released


Step = Output | Exception | Hang
Script = Callable[["FakeBackend", Request], list[Step]]


def draw_tokens(tokenizer: Tokenizer, request: Request) -> list[int]:
    """Tokens that depend on prompt, seed and choice alone, as the engine's do; ends inside a character now and then."""
    if request.params.grammar:
        return follow(tokenizer, request)
    ids = [token_id for word in WORDS for token_id in tokenizer.encode(word)]
    key = f"{request.prompt_token_ids} {request.params.seed} {request.choice_index}".encode()
    digest = hashlib.shake_256(key).digest(request.params.max_tokens)
    return [ids[byte % len(ids)] for byte in digest]


def follow(tokenizer: Tokenizer, request: Request) -> list[int]:
    """Tokens as the request's grammar wants them, drawn from what it allows; the end is not among them."""
    params = replace(request.params, thinking=None)
    vocabulary = GrammarVocabulary(tokenizer, tokenizer.vocab_size, sorted(tokenizer.eos_token_ids))
    constraint = SequenceConstraint(params, tokenizer.vocab_size, vocabulary.eos_token_ids)
    constraint.begin(LLMatcher(vocabulary.tokenizer, params.grammar, log_level=0))
    drawn: list[int] = []
    chance = random.Random(f"{params.seed} {request.choice_index}")
    while len(drawn) < params.max_tokens:
        mask = constraint.allowed(drawn)
        assert mask is not None and not constraint.error, constraint.error
        token_id = int(chance.choice(tokens_in(mask)))
        if token_id in tokenizer.eos_token_ids:
            break
        drawn.append(token_id)
    return drawn


def speak(backend: FakeBackend, request: Request) -> list[Step]:
    """One output per token up to max_tokens, with whatever the request's params ask for."""
    return say(backend, request, draw_tokens(backend.tokenizer, request))


def say(backend: FakeBackend, request: Request, token_ids: list[int]) -> list[Step]:
    """Outputs that say exactly these tokens."""
    params = request.params
    detokenizer = IncrementalDetokenizer(backend.tokenizer, request.prompt_token_ids[-4:], params.skip_special_tokens)
    outputs: list[Output] = []
    for position, token_id in enumerate(token_ids):
        is_last = position == len(token_ids) - 1
        text = detokenizer.push(token_id) + (detokenizer.flush() if is_last else "")
        scores = () if params.logprobs is None else (score(token_id, params.logprobs),)
        ended = FinishReason.STOP if params.grammar and position + 1 < params.max_tokens else FinishReason.LENGTH
        reason = ended if is_last else None
        outputs.append(Output(request.request_id, position, (token_id,), text, scores, reason))
    report = HandoffReport("prefill-0", "decode-0", "shm", kv_bytes=4096, transfer_s=0.25, prefill_s=0.5)
    outputs[0] = outputs[0]._replace(cached_tokens=backend.cached_tokens, handoff=report)
    if params.prompt_logprobs is None:
        return list(outputs)
    parts = score_prompt(request.prompt_token_ids, params.prompt_logprobs)
    return [*(Output(request.request_id, 0, prompt_logprobs=(part,)) for part in parts), *outputs]


def score_prompt(token_ids: Sequence[int], num_top: int) -> list[PromptScores]:
    """What `score` says of each token but the first, in parts as workers send them."""
    scored = [score(token_id, num_top) for token_id in token_ids[1:]]
    logprobs = np.array([entry.logprob for entry in scored], np.float32)
    top_ids = np.array([[token for token, _ in entry.top] for entry in scored], np.int32)
    top_logprobs = np.array([[logprob for _, logprob in entry.top] for entry in scored], np.float32)
    ranks = np.full(len(scored), 7, np.int32)
    shape = (len(scored), num_top)
    whole = PromptScores(
        1, np.array(token_ids[1:], np.int32), logprobs, ranks, top_ids.reshape(shape), top_logprobs.reshape(shape)
    )
    return [whole.part(start, start + 5) for start in range(1, whole.end, 5)]


def score(token_id: int, num_top: int) -> TokenLogprob:
    """The best alternative is token 300; the last one has no probability at all; the token itself comes seventh."""
    top = [(300 + place, -0.5 - place) for place in range(num_top)]
    if num_top > 1:
        top[-1] = (top[-1][0], float("-inf"))
    return TokenLogprob(token_id, -1.25, tuple(top), rank=7)


class FakeStream:
    """Plays one script. Once closed, or after the last step, it is over."""

    def __init__(self, backend: FakeBackend, request: Request, steps: list[Step]) -> None:
        self._backend = backend
        self._request = request
        self._steps = iter(steps)
        self._next: Step | None = None
        self._is_over = False
        self.decision = DECISION if backend.wishes[-1].explain else None

    def take(self, wake: Callable[[], None]) -> Output | None:
        step = self._next or next(self._steps)
        self._next = None
        if isinstance(step, Hang):
            if step.wake_when_released(wake):
                self._next = step
                return None
            return self.take(wake)
        if isinstance(step, Exception):
            self._is_over = True
            raise step
        self._is_over = step.finish_reason is not None
        if not self._is_over:  # a step a turn of the loop
            asyncio.get_running_loop().call_soon(wake)
        return step

    def close(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._backend.note_cancelled(self._request.request_id)


class FakeBackend:
    """`script` makes the steps of each request; `refusals` maps the number of a submission to what it raises."""

    request_timeout_s = 600.0

    def __init__(self, tokenizer: Tokenizer, script: Script = speak) -> None:
        self.tokenizer = tokenizer
        self.script = script
        self.model: ModelInfo | None = replace(MODEL, vocab_size=max(MODEL.vocab_size, tokenizer.vocab_size))
        self.ready = True
        self.on_job_ended: Callable[[str], None] = lambda job: None
        self.cached_tokens = 0
        self.refusals: dict[int, Exception] = {}
        self.requests: list[Request] = []
        self.wishes: list[Wishes] = []
        self.cancelled: list[str] = []
        self._changed = threading.Condition()
        self.roles = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
        self.drained: set[str] = set()
        self.pinned: set[str] = set()
        self.seen = Lookout()
        self.loading: tuple[LoadingWorker, ...] = ()
        self.routers: tuple[ListedRouter, ...] = ()
        self.ranks: dict[str, tuple[RankStatus, ...]] = {}

    def reset(self, script: Script = speak) -> None:
        """As new; the server that runs over this backend stays."""
        served = self.on_job_ended
        self.__init__(self.tokenizer, script)  # type: ignore[misc]
        self.on_job_ended = served

    def is_ready(self) -> bool:
        return self.ready

    def submit(self, request: Request, wishes: Wishes = NO_WISHES, part: JobPart = NO_JOB) -> FakeStream:
        with self._changed:
            refusal = self.refusals.get(len(self.requests))
            if refusal is not None:
                raise refusal
            self.requests.append(request)
            self.wishes.append(wishes)
            self._changed.notify_all()
        return FakeStream(self, request, self.script(self, request))

    def note_cancelled(self, request_id: str) -> None:
        with self._changed:
            self.cancelled.append(request_id)
            self._changed.notify_all()

    def wait_until(self, promise: Callable[[FakeBackend], bool]) -> bool:
        """Called from a test's thread: True once the promise holds, False when it never does."""
        with self._changed:
            return self._changed.wait_for(lambda: promise(self), timeout=30)

    async def find(self, job: str, ends: bool = False) -> FoundJob:
        return FoundJob()

    def status(self) -> RouterStatus:
        views = tuple(WorkerView(self._worker(name), True, 0.0, 0, speed=1.5) for name in self.roles)
        kinds = tuple(KindForecast("m/1x", 7, (("step", 0.004), ("prompt", 2e-5))) for _ in range(2))
        forecast = ForecastStatus(kinds, handoff_s=0.002)
        return RouterStatus("router-0", views, 2, 1, (("retries", 4.0),), forecast, self.loading, self.routers)

    async def set_role(
        self, worker_id: str, role: Role, force: bool = False, is_pinned: bool | None = None
    ) -> WorkerStatus:
        if is_pinned is not None:
            await self.set_pinned(worker_id, is_pinned)
        others = [self.roles[name] for name in self.roles if name != worker_id]
        if not force and not any(other.can_decode for other in (*others, role)):
            raise InvalidRequest("no worker could decode afterwards", "role")
        self.roles[worker_id] = role
        return self._worker(worker_id)

    async def set_draining(self, worker_id: str, is_draining: bool, force: bool = False) -> WorkerStatus:
        if is_draining and not force and len(self.roles) - len(self.drained) < 2:
            raise InvalidRequest("no worker could decode afterwards", "worker_id")
        (self.drained.add if is_draining else self.drained.discard)(worker_id)
        return self._worker(worker_id)

    async def set_pinned(self, worker_id: str, is_pinned: bool) -> None:
        (self.pinned.add if is_pinned else self.pinned.discard)(worker_id)

    def lookout(self) -> Lookout:
        return self.seen

    def ways_of(self, asked: str) -> tuple[float, tuple[Way, ...]]:
        return self.seen.now_s, tuple(way for way in self.seen.oldest if is_called(way.request_id, asked))

    def role_report(self) -> RolesReport:
        page = {"leader": "router-0", "workers": [{"worker_id": name} for name in self.roles]}
        counts = (SwitchCount("decode", "prefill", "controller", "done", 2),)
        return RolesReport(page, True, 5, counts, (("fencing", 0.004, 0.009),), 1.5, 1.25)

    def _worker(self, name: str) -> WorkerStatus:
        load = Load(num_free_blocks=7, num_blocks=9)
        return WorkerStatus(
            name,
            (1_795_974_964 << 32) + 1,
            self.roles[name],
            MODEL,
            load,
            counters=(("preemptions", 3.0),),
            is_draining=name in self.drained,
            ranks=self.ranks.get(name, ()),
        )


MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
"""A conversation for requests that are about something else."""


@contextmanager
def serve(
    backend: FakeBackend,
    config: ApiConfig | None = None,
    http: HttpConfig | None = None,
    tenancy: Tenancy | None = None,
    usage_log: UsageLog | None = None,
) -> Iterator[str]:
    """A real HTTP server on a free port of this host, in a thread; the value is its URL."""
    app = create_app(backend, backend.tokenizer, config or ApiConfig(), None, tenancy, usage_log)
    listening = threading.Event()
    server = HttpServer(app, http or HttpConfig(), 30.0, listening.set, app.state.metrics.count_refused_connection)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert listening.wait(30), "the server did not start"
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        app.state.access_log.close()


@dataclass(frozen=True, slots=True)
class Api:
    """A served FakeBackend and two clients of it: openai's own, and plain HTTP for what that one hides."""

    backend: FakeBackend
    url: str
    client: openai.OpenAI
    http: httpx.Client


@contextmanager
def open_api(
    config: ApiConfig | None = None,
    key: str = "any",
    http: HttpConfig | None = None,
    checkpoint: Path = CHECKPOINT,
    tenancy: Tenancy | None = None,
    usage_log: UsageLog | None = None,
    kind: type[FakeBackend] = FakeBackend,
) -> Iterator[Api]:
    """Serves a checkpoint's tokenizer over a FakeBackend for as long as the context lasts."""
    backend = kind(Tokenizer.load(checkpoint))
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    with (
        serve(backend, config, http, tenancy, usage_log) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30) as client,
        httpx.Client(base_url=url, headers=headers, timeout=30) as plain,
    ):
        yield Api(backend, url, client, plain)


def error_of(response: Any) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    assert response.headers["x-should-retry"] in ("true", "false")
    error: dict[str, Any] = body["error"]
    return error
