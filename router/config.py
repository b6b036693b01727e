"""The settings of one router and its HTTP API: addresses, keys, bounds, and how long it waits for workers."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Literal

from annotated_types import Ge

from router.api.formats.formats import AUTO, check_parsers
from router.policies.catalogue import check_name
from router.tenants.config import TenantsConfig
from workers.config import Count, Delay, Natural, Port, Seconds, Text
from workers.errors import InvalidConfig, InvalidRequest
from workers.request import SamplingParams

_ANY_VOCABULARY = 1 << 31


@dataclass(frozen=True, slots=True)
class CorsConfig:
    """Which web pages of other places may call the API from a browser; /admin is never for them."""

    origins: tuple[Text, ...] = ()
    """Such as https://chat.example.com; "*": all pages, which needs API keys; empty: none."""
    methods: tuple[Text, ...] = ("GET", "POST", "DELETE")
    """What such a page may ask with."""
    headers: tuple[Text, ...] = ("*",)
    """Of requests, beside those that need no leave; "*": all."""
    max_age_s: Natural = 600
    """For so long a browser need not ask again."""


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """Every bound the API keeps; checked where settings are read (cluster.settings.build)."""

    api_keys: tuple[Text, ...] = field(default=(), repr=False)
    """Bearer keys for everything but /health, /ready, /version, /metrics, /docs, /openapi.json and /admin; empty: only clients of this host are served.
    A key, or its hash as `sha256:HEX`; only hashes are kept."""
    admin_keys: tuple[Text, ...] = field(default=(), repr=False)
    """Keys for /admin, which api_keys do not open; without any keys clients of this host may use it, with api_keys alone nobody."""
    insecure: bool = False
    """Without api_keys: listen on other addresses than loopback all the same, and serve whoever asks (not /admin)."""
    allowed_hosts: tuple[Text, ...] = ()
    """Without api_keys: names beside localhost that a request's Host may have, such as that of a proxy."""
    metrics: Literal["open", "key"] = "open"
    """Who may read /metrics, which names workers and says how busy they are: everybody, or who has an API key or an admin key."""
    metrics_compat: Literal["none", "vllm"] = "none"
    """vllm: /metrics has the main numbers under vLLM's names besides, for autoscalers and gateways that read those."""
    docs: Literal["open", "key"] = "open"
    """Who may read /docs and /openapi.json, which are the same for every cluster of this version; as metrics."""
    max_body_bytes: Annotated[int, Ge(1024)] = 16 << 20
    """Larger request bodies are refused with 413."""
    max_open_body_bytes: Annotated[int, Ge(1024)] = 256 << 20
    """Of all bodies that are being received or wait to be read, beyond 64 KiB of each; a request that takes more is refused with 429."""
    min_free_bytes: Annotated[int, Ge(0)] = 128 << 20
    """While this host, or this container, has less memory left, bodies above 64 KiB are refused with 429; 0: never."""
    max_n: Count = 128
    """Choices per prompt."""
    max_prompts: Count = 1024
    """Prompts in one completions request."""
    max_choices: Count = 2048
    """Prompts times n of one request."""
    max_background: Count = 256
    """Responses of one tenant that one router runs in the background at once, and a fourth of what it runs of all tenants together;
    without tenants of all."""
    client_grace_s: Delay = 30.0
    """A request with an Idempotency-Key runs on for so long when its client has gone, because it may come back; 0: not at all."""
    join_request_ids: bool = False
    """Take X-Request-Id for an Idempotency-Key where there is none. For each such request all workers are asked first, so not behind
    a proxy that gives every request one."""
    heartbeat_s: Seconds = 15.0
    """A stream that is silent for this long sends an SSE comment, so that proxies keep it open."""
    offload_bytes: Natural = 4 << 10
    """Bodies larger than this are validated and tokenized in a thread, so that other streams do not stall."""
    allow_control_tokens: bool = False
    """Whether control tokens that stand in a message's text, such as <|end_of_sentence|>, are tokens; otherwise they are letters.
    In prompts of /v1/completions they always are tokens."""
    max_prompt_scores: Natural = 3 << 20
    """Entries of one request's prompt_logprobs: prompt tokens times n times (k + 1). 131,072 tokens with 20 alternatives need 2.8
    million; each is 8 bytes here and some 60 in the answer."""
    max_alternatives: Natural = 1 << 19
    """Alternatives of one request's output tokens where it asks for more than 20 for each: n times max_tokens times those. Each takes some
    100 bytes here until its answer is written."""
    max_beam_tokens: Natural = 1 << 24
    """What the beam searches of one request may take: of each prompt beam_width times max_tokens, which is how many requests of one
    token it makes, times the tokens of prompt and answer, which each of them may have; of all its prompts together."""
    allow_chat_template: bool = False
    """Whether a client may send a chat template of its own (`chat_template`), which runs in the sandbox that checkpoints' run in."""
    turn_memory_bytes: Natural = 0
    """What this router may remember of assistants' turns, 4 bytes a token, so that the next prompt of a conversation begins with the tokens
    that were generated and finds their KV. The tokens of a prompt then depend on what is remembered, not on its messages alone; 0: off."""
    reasoning_parser: Text = AUTO
    """How the model writes its reasoning (router/api/formats/formats.py); auto: as its chat template shows."""
    tool_parser: Text = AUTO
    """How it writes calls of tools; auto likewise."""
    cors: CorsConfig = field(default_factory=CorsConfig)
    """Off by default."""
    root_path: str = ""
    """A prefix that a proxy before this router puts before all paths, such as /baton; paths without it are served too."""
    access_log: Literal["off", "text", "json"] = "off"
    """One line for each request, without any text of it. json: one for each choice, which `baton simulate` reads as a trace."""
    access_log_file: str = ""
    """Lines are appended here, by all routers of a host; a file that was moved away is made anew. Empty: standard error."""
    sampling_defaults: SamplingParams = field(default_factory=SamplingParams)
    """Used for what a client leaves open, but for `max_tokens` and logprobs, which are the client's alone; see router/sampling_defaults.py.
    Token ids are checked when the vocabulary is known."""

    def __post_init__(self) -> None:
        self.check_sampling_defaults(_ANY_VOCABULARY)
        check_parsers(self.reasoning_parser, self.tool_parser)
        if "*" in self.cors.origins and not self.api_keys:
            raise InvalidConfig("router.api.cors.origins must name pages where no API keys are set; it is *")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise InvalidConfig(
                f"router.api.root_path must begin with a slash and not end in one; it is {self.root_path!r}"
            )
        for name in ("api_keys", "admin_keys"):
            object.__setattr__(self, name, tuple(hashed(key) for key in getattr(self, name)))

    def check_sampling_defaults(self, vocab_size: int) -> None:
        """Raises InvalidConfig for defaults that no request could be run with, and for such as would have no effect."""
        for name in ("max_tokens", "logprobs", "prompt_logprobs", "logprob_token_ids"):
            if getattr(self.sampling_defaults, name) != getattr(SamplingParams(), name):
                raise InvalidConfig(f"router.api.sampling_defaults.{name} is for each request to say; leave it out")
        try:
            self.sampling_defaults.validate(vocab_size)
        except InvalidRequest as error:
            raise InvalidConfig(f"router.api.sampling_defaults.{error}") from error


def hashed(key: str) -> str:
    """What is kept of a key: `sha256:HEX`. A hash stays as it is."""
    if re.fullmatch("sha256:[0-9a-f]{64}", key):
        return key
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether a name or address means this host and is reached from it alone."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """Kept for every connection, before any key is looked at. Bodies have their own bounds in router.api."""

    max_connections: Count = 8192
    """Open at once; a further one is told 503 and closed."""
    max_header_bytes: Annotated[int, Ge(4096)] = 64 << 10
    """Of a request's line and headers together; a larger head is refused with 431."""
    max_headers: Annotated[int, Ge(16)] = 128
    """Headers of one request; more are refused with 431."""
    max_pipelined: Count = 16
    """Requests that a connection may have sent ahead of the one that is answered; with more it is closed."""
    header_timeout_s: Seconds = 10.0
    """From a connection's first byte, or its opening, until a request's headers are there; then 408."""
    body_timeout_s: Seconds = 60.0
    """From its headers until the whole body is there; then 408."""
    write_timeout_s: Seconds = 30.0
    """How long a client may take to read what waits for it before its connection is cut: 64 KiB wait at most."""


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Settings of a router; every bound the router keeps is here. Times in seconds, sizes in tokens, blocks or counts.

    Types and bounds are checked where settings are read (cluster.settings.build).
    """

    model: Text
    """Path of a checkpoint folder; the router reads its tokenizer only."""
    host: Text = "127.0.0.1"
    port: Port = 8000
    """HTTP port; 0: any free one."""
    share_port: bool = False
    """Other routers of this user listen on the port as well (SO_REUSEPORT); see pools.share_port."""
    uds: str = ""
    """Path of a Unix socket to listen on besides; who may use it is said by the folder it is in. Further routers add .1, .2 ..."""
    cert_file: str = ""
    """PEM file with the certificate, and those up to its authority, that HTTPS is served with; empty: HTTP. A file that changes is read again."""
    key_file: str = ""
    """Its private key; empty: it is in cert_file."""
    policy: Text = "kv_aware"
    """Who gets a request: kv_aware, session_affinity, prefix_affinity, least_loaded, round_robin or random."""
    policy_seed: Natural = 0
    """Of the policy `random`."""
    admission: Literal["soft", "strict"] = "soft"
    """What becomes of requests with targets: soft, the one whose first token is due first goes first; strict, besides, one whose
    targets are out of reach by what was learnt of times is refused at once, with 429."""
    ttft_target_s: Delay = 0.0
    """When the first token is due after arrival, for requests that do not say `ttft`; 0: they have no target."""
    tpot_target_s: Delay = 0.0
    """What may pass between two tokens, on average, for requests that do not say `tpot`; 0: whatever it takes."""
    patience_s: Seconds = 30.0
    """A request without a `ttft`, or whose `ttft` has passed while it waited, stands in line as if its first token were due so long
    after its arrival."""
    max_queue: Count = 2048
    """Requests waiting for a worker before QUEUE_FULL."""
    max_running: Count = 1024
    """Requests on workers at once."""
    max_attempts: Count = 5
    """Attempts of one request in a row that bring no token before it is given up."""
    max_lost_workers: Count = 2
    """Workers that may be lost one after the other while they run one request, and before it gets another token: it may be what kills
    them, and is given up."""
    retry_backoff_s: Delay = 0.1
    """Wait before the second re-run in a row (the first is immediate); doubles each time."""
    max_retry_backoff_s: Delay = 2.0
    recovery_timeout_s: Seconds = 60.0
    """How long a request waits for a worker to come back, or for busy ones to take it."""
    request_timeout_s: Seconds = 600.0
    """Longest life of a request, waiting included."""
    first_token_deadline_s: Delay = 0.0
    """When the first token is due after a request's arrival: workers choose by it how to go on after a lost handoff. 0: only
    request_timeout_s counts."""
    worker_stale_s: Seconds = 5.0
    """A worker that was silent for this long is given up; a healthy one speaks about once a second. Time in which the router itself
    stood still does not count."""
    settle_s: Delay = 0.5
    """A request counts as extra load on its workers until a load report this much later than its submission."""
    max_prefix_index_blocks: Count = 500_000
    """Blocks of prompts in the prefix index, whoever holds them. Each takes at most 180 bytes and 28 bytes for the set of its holders, with
    4 more for each 30 workers: 110 MB with 64 workers, 170 MB with 1,000."""
    worker_backlog: Count = 4
    """Requests that may wait at a worker for a slot or for blocks; what is beyond waits in the router's queue, and goes where room comes first."""
    prefill_backlog_tokens: Count = 32_768
    """Prompt tokens that may wait at a worker to be computed; below that it takes another prompt of any length."""
    max_prefill_candidates: Natural = 3
    """Prefill workers that a decode worker may try for one request."""
    max_local_prefill_tokens: Natural = 16_384
    """A decode worker may be told to compute a prompt itself when at most so many of its tokens are uncached there (2,048 where the request
    has no `tpot`), and that is expected to be quicker than a prefill worker and to let what decodes there keep its `tpot`; 0: never (but see
    worker.local_prefill_tokens)."""
    lower_tier_cost_tokens: Natural = 8
    """What bringing back one cached block from a worker's host memory or disk weighs against computing prompt tokens; a block has 64."""
    pull_min_blocks: Natural = 8
    """A worker that computes a prompt is told of another one that holds at least so many more blocks of it; 0: never."""
    expected_output_tokens: Count = 256
    """An answer is assumed to get at most this long when free KV blocks are compared."""
    max_migrations: Natural = 4
    """Running requests that move to another decode worker at once; 0: none ever moves."""
    migration_timeout_s: Seconds = 10.0
    """A migration that has not come about after this long is given up; the request goes on where it is."""
    migration_retry_s: Delay = 0.5
    """How long a request is left alone after a migration that came to nothing."""
    rebalance: bool = True
    """Move running requests from the fullest to the emptiest decode worker."""
    rebalance_gap: Annotated[int, Ge(2)] = 8
    """How many sequences more the fullest must have; a move evens out two."""
    rebalance_pressed_gap: Annotated[int, Ge(2)] = 2
    """The same when the fullest has requests waiting for blocks, or has just preempted some."""
    rebalance_cooldown_s: Delay = 5.0
    """Rest after the two have become even."""
    rebalance_moves_per_s: Seconds = 4.0
    """At most so many moves for the sake of balance."""
    find_timeout_s: Seconds = 2.0
    """How long workers may take to say what they have of a request that a client asks for again."""
    max_buffered_tokens: Count = 8192
    """Tokens that wait for a slow client before its request is cancelled."""
    max_pending_messages: Count = 4096
    """Messages that wait to be sent to one worker before it is given up."""
    tick_s: Seconds = 0.1
    """How often timeouts are looked at."""
    set_role_timeout_s: Seconds = 30.0
    """How long a worker may take to say that it has another role, or drains."""
    shutdown_timeout_s: Delay = 20.0
    """How long running requests may take to finish when the router is told to stop; what runs then ends with an error. New ones
    are refused meanwhile. 0: all end at once."""
    keepalive_s: Seconds = 120.0
    """An idle HTTP connection is closed after this long. Longer than clients and proxies keep theirs (60 to 90 s usually): a
    request that is sent while the connection is being closed is lost."""
    otlp_endpoint: str = ""
    """URL of an OpenTelemetry collector, as worker.otlp_endpoint."""
    http: HttpConfig = field(default_factory=HttpConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    tenants: TenantsConfig = field(default_factory=TenantsConfig)
    """Whose keys there are, and what each may use (docs/tenants.md)."""

    def __post_init__(self) -> None:
        check_name(self.policy)
        if not (self.api.api_keys or self.tenants.is_on or self.api.insecure or is_loopback(self.host)):
            raise InvalidConfig(
                f"router.host {self.host} is reached from other hosts, and no API keys are set: set them (--api-key-file, "
                "BATON_API_KEY, router.api.api_keys, router.tenants), or say --insecure to serve whoever asks"
            )
        if self.key_file and not self.cert_file:
            raise InvalidConfig("router.key_file needs router.cert_file")
        if self.max_retry_backoff_s < self.retry_backoff_s:
            raise InvalidConfig(
                f"router.max_retry_backoff_s must be at least retry_backoff_s; it is {self.max_retry_backoff_s!r}"
            )
