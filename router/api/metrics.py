"""What the API measures, in Prometheus form; it holds numbers and decides nothing."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import exposition as open_metrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from router.api.objectives import attainment
from router.api.status_metrics import Snapshot
from router.backend import Backend
from workers.config import BEST_FIRST
from workers.handoff.protocol.choices import Recovery
from workers.request import HandoffReport

_API_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/responses",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/load",
    "/admin/status",
)
_ENDPOINTS = frozenset((*_API_PATHS, "/health", "/ready", "/version", "/metrics", "/docs", "/openapi.json"))
_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_E2E_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_TRANSFER_BUCKETS = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

# All names are such as every Prometheus reads. The client's own choice would make vLLM's "vllm:" "vllm_" in samples, but not in their types.
write_open_metrics = partial(open_metrics.generate_latest, escaping=open_metrics.ALLOWUTF8)


class Metrics:
    """The counters of one app, in a registry of its own, so that several apps share a process."""

    def __init__(self, backend: Backend, compat: str = "none") -> None:
        """`compat`: whose names the numbers have besides; see ApiConfig.metrics_compat."""
        self._compat = compat
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = Counter(
            "baton_requests", "HTTP requests answered", ("endpoint", "status", "refusal"), registry=registry
        )
        self._refused_connections = Counter(
            "baton_http_connections_refused", "Connections closed for breaking a bound", ("reason",), registry=registry
        )
        self.running = Gauge("baton_num_requests_running", "Requests that generate now", registry=registry)
        self.ttft = Histogram(
            "baton_time_to_first_token_seconds",
            "From submission to a choice's first token",
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.inter_token = Tally("baton_inter_token_latency_seconds", "Between the tokens of a choice", _GAP_BUCKETS)
        registry.register(self.inter_token)
        self.e2e = Histogram(
            "baton_e2e_request_latency_seconds",
            "From submission to the last token of a request",
            buckets=_E2E_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter("baton_prompt_tokens", "Prompt tokens of finished requests", registry=registry)
        self.generation_tokens = Total("baton_generation_tokens", "Tokens generated")
        registry.register(self.generation_tokens)
        self.cached_tokens = Counter(
            "baton_cached_prompt_tokens", "Prompt tokens of finished requests found in a cache", registry=registry
        )
        self.finished = Counter("baton_choices_finished", "Choices that have ended", ("reason",), registry=registry)
        self._handoff_bytes = Counter(
            "baton_kv_handoff_bytes", "KV bytes moved from prefill to decode", ("transport",), registry=registry
        )
        self._handoff_seconds = Histogram(
            "baton_kv_handoff_seconds",
            "Duration of a KV handoff",
            ("transport",),
            buckets=_TRANSFER_BUCKETS,
            registry=registry,
        )
        self._handoff_wait = Histogram(
            "baton_kv_handoff_wait_seconds",
            "From opening a KV handoff to its first piece",
            ("transport",),
            buckets=_TRANSFER_BUCKETS,
            registry=registry,
        )
        self._handoff_exposed = Histogram(
            "baton_kv_handoff_exposed_seconds",
            "From the end of a remote prefill to the last piece in its place",
            ("transport",),
            buckets=_TRANSFER_BUCKETS,
            registry=registry,
        )
        self._queue = Histogram(
            "baton_decode_queue_seconds",
            "From submission until the decode worker had room",
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self._handoff_attempts = Counter(
            "baton_kv_handoff_extra_attempts", "Workers asked to compute a prompt after a first one", registry=registry
        )
        self._handoff_resends = Counter("baton_kv_handoff_resent_pieces", "KV pieces sent again", registry=registry)
        self._handoff_degradations = Counter(
            "baton_kv_handoff_degradations", "Changes of transport in mid-transfer", registry=registry
        )
        self._recoveries = Counter(
            "baton_kv_handoff_recoveries", "Prompts by how a lost handoff was answered", ("way",), registry=registry
        )
        self._backend = backend

    def count_request(self, path: str, status: int, refusal: str) -> None:
        """`path` outside the known endpoints counts as "other": clients do not make up label values."""
        self._requests.labels(path if path in _ENDPOINTS else "other", str(status), refusal).inc()

    def attainment(self) -> dict[str, float]:
        """As router.api.objectives.attainment."""
        return attainment(self.ttft, self._requests)

    def count_refused_connection(self, reason: str) -> None:
        self._refused_connections.labels(reason).inc()

    def observe_handoff(self, report: HandoffReport) -> None:
        """Prompts computed where they decode moved nothing; what was tried before counts."""
        self._queue.observe(report.queue_s)
        self._handoff_attempts.inc(max(0, report.attempts - 1))
        self._handoff_resends.inc(report.resends)
        self._handoff_degradations.inc(report.degradations)
        # What a worker calls things makes no labels.
        if report.recovery:
            self._recoveries.labels(report.recovery if report.recovery in set(Recovery) else "other").inc()
        transport = report.transport if report.transport in BEST_FIRST else "other"
        if report.transport != "local":
            self._handoff_wait.labels(transport).observe(report.wait_s)
            self._handoff_exposed.labels(transport).observe(report.exposed_s)
            self._handoff_bytes.labels(transport).inc(report.kv_bytes)
            self._handoff_seconds.labels(transport).observe(report.transfer_s)

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition text and its content type; written in a thread, for with many workers it is long."""
        encode, content_type = choose_encoder(accept)
        if content_type.startswith("application/openmetrics-text"):
            encode, content_type = write_open_metrics, open_metrics.CONTENT_TYPE_LATEST
        model = self._backend.model
        named = model.name if model is not None and self._compat == "vllm" else ""
        snapshot = Snapshot(self.registry, self._backend.status(), self._backend.role_report(), named)
        return await asyncio.to_thread(encode, snapshot), content_type


class Total(Collector):
    """A counter for what happens with every token: it is written to by one thread, and without a lock."""

    def __init__(self, name: str, documentation: str) -> None:
        self._name = name
        self._documentation = documentation
        self._value = 0

    def inc(self, amount: int) -> None:
        self._value += amount

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._documentation, self._value)


class Tally(Collector):
    """A histogram for what happens with every token: it is written to by one thread, and without a lock."""

    def __init__(self, name: str, documentation: str, buckets: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._examples: list[tuple[dict[str, str], float, float] | None] = [None] * (len(buckets) + 1)
        """Labels, value, and seconds since 1970; of each bucket the last."""
        self._sum = 0.0

    def observe(self, value: float, exemplar: dict[str, str] | None = None) -> None:
        """`exemplar`: labels by which this value can be looked at; each bucket keeps its last one."""
        place = bisect_left(self._bounds, value)
        self._counts[place] += 1
        self._sum += value
        if exemplar is not None:
            self._examples[place] = (exemplar, value, time.time())

    def describe(self) -> list[Metric]:
        return [HistogramMetricFamily(self._name, self._documentation)]

    def collect(self) -> Iterator[Metric]:
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = [
            (bound, float(count)) if example is None else (bound, float(count), Exemplar(*example))
            for bound, count, example in zip(bounds, accumulate(self._counts), self._examples, strict=True)
        ]
        yield HistogramMetricFamily(self._name, self._documentation, buckets, self._sum)
