"""The settings of one router: its address, its bounds, and how long it waits for workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.api.config import ApiConfig
from workers.errors import InvalidConfig

POLICIES = ("kv_aware", "round_robin")


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Settings of a router; every bound the router keeps is here. Times in seconds, sizes in tokens, blocks or counts.

    Raises InvalidConfig on construction when a value cannot work.
    """

    model: str
    """Path of a checkpoint folder; the router reads its tokenizer only."""
    host: str = "127.0.0.1"
    port: int = 8000
    """HTTP port; 0: any free one."""
    policy: str = "kv_aware"
    """kv_aware or round_robin."""
    max_queue: int = 2048
    """Requests waiting for a worker before QUEUE_FULL."""
    max_running: int = 1024
    """Requests on workers at once."""
    max_attempts: int = 5
    """Attempts of one request in a row that bring no token before it is given up."""
    retry_backoff_s: float = 0.1
    """Wait before the second re-run in a row (the first is immediate); doubles each time."""
    max_retry_backoff_s: float = 2.0
    recovery_timeout_s: float = 60.0
    """How long a request waits for a worker to come back, or for busy ones to take it."""
    request_timeout_s: float = 600.0
    """Longest life of a request, waiting included."""
    first_token_deadline_s: float = 0.0
    """When the first token is due after a request's arrival: workers choose by it how to go on after a lost handoff. 0: only
    request_timeout_s counts."""
    worker_stale_s: float = 5.0
    """A worker that was silent for this long is given up; a healthy one speaks about once a second."""
    settle_s: float = 0.5
    """A request counts as extra load on its workers until a load report this much later than its submission."""
    max_prefix_index_blocks: int = 500_000
    """Blocks of prompts in the prefix index, whoever holds them. Each takes at most 180 bytes and 28 bytes for the set of its holders, with
    4 more for each 30 workers: 110 MiB with 64 workers, 170 MiB with 1,000."""
    max_prefill_candidates: int = 3
    """Prefill workers that a decode worker may try for one request."""
    sequence_cost_tokens: int = 128
    """What one more running sequence weighs against uncached prompt tokens when a decode worker is chosen."""
    handoff_cost_tokens: int = 64
    """What moving a prompt's KV weighs against computing it on a MIXED decode worker."""
    lower_tier_cost_tokens: int = 8
    """What bringing back one cached block from a worker's host memory or disk weighs against computing prompt tokens; a block has 64."""
    pull_min_blocks: int = 8
    """A worker that computes a prompt is told of another one that holds at least so many more blocks of it; 0: never."""
    expected_output_tokens: int = 256
    """An answer is assumed to get at most this long when free KV blocks are compared."""
    max_migrations: int = 4
    """Running requests that move to another decode worker at once; 0: none ever moves."""
    migration_timeout_s: float = 10.0
    """A migration that has not come about after this long is given up; the request goes on where it is."""
    migration_retry_s: float = 0.5
    """How long a request is left alone after a migration that came to nothing."""
    rebalance: bool = True
    """Move running requests from the fullest to the emptiest decode worker."""
    rebalance_gap: int = 8
    """How many sequences more the fullest must have."""
    rebalance_pressed_gap: int = 2
    """The same when the fullest has requests waiting for blocks, or has just preempted some."""
    rebalance_cooldown_s: float = 5.0
    """Rest after the two have become even."""
    rebalance_moves_per_s: float = 4.0
    """At most so many moves for the sake of balance."""
    max_buffered_tokens: int = 8192
    """Tokens that wait for a slow client before its request is cancelled."""
    max_pending_messages: int = 4096
    """Messages that wait to be sent to one worker before it is given up."""
    tick_s: float = 0.1
    """How often timeouts are looked at."""
    set_role_timeout_s: float = 30.0
    """How long a worker may take to say that it has another role, or drains."""
    shutdown_timeout_s: float = 20.0
    """How long running requests may take to finish when the router is told to stop; what runs then ends with an error. New ones
    are refused meanwhile. 0: all end at once."""
    keepalive_s: float = 120.0
    """An idle HTTP connection is closed after this long. Longer than clients and proxies keep theirs (60 to 90 s usually): a
    request that is sent while the connection is being closed is lost."""
    api: ApiConfig = field(default_factory=ApiConfig)

    def __post_init__(self) -> None:
        checks = [
            (bool(self.model), "model", "needs the path of a checkpoint folder"),
            (bool(self.host), "host", "needs an address to listen on"),
            (0 <= self.port < 65536, "port", "must be a TCP port, or 0 for any free one"),
            (self.policy in POLICIES, "policy", f"must be one of {', '.join(POLICIES)}"),
            (self.max_prefill_candidates >= 0, "max_prefill_candidates", "must not be negative"),
            (self.first_token_deadline_s >= 0, "first_token_deadline_s", "must not be negative"),
            (self.retry_backoff_s >= 0, "retry_backoff_s", "must not be negative"),
            (self.shutdown_timeout_s >= 0, "shutdown_timeout_s", "must not be negative"),
            (self.settle_s >= 0, "settle_s", "must not be negative"),
            (self.sequence_cost_tokens >= 0, "sequence_cost_tokens", "must not be negative"),
            (self.max_migrations >= 0, "max_migrations", "must not be negative"),
            (self.rebalance_gap >= 2, "rebalance_gap", "must be at least 2: a move evens out two"),
            (self.rebalance_pressed_gap >= 2, "rebalance_pressed_gap", "must be at least 2: a move evens out two"),
            (self.rebalance_cooldown_s >= 0, "rebalance_cooldown_s", "must not be negative"),
            (self.migration_retry_s >= 0, "migration_retry_s", "must not be negative"),
            (self.handoff_cost_tokens >= 0, "handoff_cost_tokens", "must not be negative"),
            (self.lower_tier_cost_tokens >= 0, "lower_tier_cost_tokens", "must not be negative"),
            (self.pull_min_blocks >= 0, "pull_min_blocks", "must be 0 (never) or positive"),
            (
                self.max_retry_backoff_s >= self.retry_backoff_s,
                "max_retry_backoff_s",
                "must be at least retry_backoff_s",
            ),
        ]
        counts = (
            "max_queue",
            "max_running",
            "max_attempts",
            "max_prefix_index_blocks",
            "expected_output_tokens",
            "max_buffered_tokens",
            "max_pending_messages",
        )
        checks += [(getattr(self, name) >= 1, name, "must be at least 1") for name in counts]
        times = (
            "recovery_timeout_s",
            "request_timeout_s",
            "worker_stale_s",
            "tick_s",
            "migration_timeout_s",
            "rebalance_moves_per_s",
            "set_role_timeout_s",
            "keepalive_s",
        )
        checks += [(getattr(self, name) > 0, name, "must be positive") for name in times]
        for ok, name, what in checks:
            if not ok:
                raise InvalidConfig(f"router.{name} {what}; it is {getattr(self, name)!r}")
