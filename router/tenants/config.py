"""Settings of tenants: where they stand, what holds for those that no file names, and where their usage is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt, Le

from workers.config import Count, Natural, Seconds, Share, Text
from workers.errors import InvalidConfig

_INT32 = 2**31 - 1
Priority = Annotated[int, Ge(-_INT32), Le(_INT32)]


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What one tenant may use, on all routers together. 0: no limit. An allowance that was not used may be used at once, up to one
    minute's."""

    requests_per_min: Natural = 0
    """HTTP requests that are run; those that are refused for lack of room do not count."""
    input_tokens_per_min: Natural = 0
    """Of prompts, cached ones included."""
    output_tokens_per_min: Natural = 0
    """Of answers: a request is admitted for what answers are expected to have, and what it really had counts."""
    max_concurrent: Natural = 0
    """HTTP requests that are answered at once."""
    weight: Annotated[float, Gt(0), Le(1000)] = 1.0
    """Its share of the workers where requests wait, in relation to others'."""
    min_priority: Priority = -_INT32
    """Lower runs first, among the tenant's own requests."""
    max_priority: Priority = _INT32
    """Another one is refused; a request that names none gets 0, or what is nearest."""
    models: tuple[Text, ...] = ()
    """That it may use; empty: all."""
    shared_prefixes: bool = False
    """Its prompts find cached blocks of all others that say so, and theirs its: for tenants that trust each other."""

    def __post_init__(self) -> None:
        if self.min_priority > self.max_priority:
            raise InvalidConfig(f"min_priority {self.min_priority} must not be above max_priority {self.max_priority}")


@dataclass(frozen=True, slots=True)
class UsageConfig:
    """The usage log: one line of JSON a request, without any of its text."""

    folder: str = ""
    """Where each router writes its file, named after it; empty: nowhere."""
    max_bytes: Annotated[int, Ge(1 << 16)] = 64 << 20
    """Of one file; then a new one begins."""
    max_files: Count = 8
    """Of one router; the oldest go."""


@dataclass(frozen=True, slots=True)
class TenantsConfig:
    """Without `enabled` and `file` there are no tenants: every key is as good as any other, and prompts share cached blocks."""

    enabled: bool = False
    """Keys belong to tenants, and nobody is served without one: those of `file`, those of `baton keys`, and router.api.api_keys, whose
    tenant is `default`."""
    file: str = ""
    """Tenants and their keys, in YAML, JSON or TOML (docs/tenants.md); read again when it changes. Implies `enabled`."""
    defaults: TenantLimits = field(default_factory=TenantLimits)
    """Of a tenant that the file does not name, `default` among them."""
    shared_prefixes: bool = False
    """Prompts of all tenants share cached blocks, as if each said so."""
    max_tenants: Count = 4096
    """In the file."""
    max_keys: Count = 16_384
    """Further keys do not count, and are named in the log."""
    slice_s: Seconds = 1.0
    """A router takes about so much of an allowance at a time as it uses within this time; longer: it asks the store less often."""
    slice_share: Share = 0.05
    """Of a minute's allowance, at most, that a router takes at a time."""
    backlog_tokens: Count = 1024
    """Of prompts, that a router lets wait at a worker while several tenants ask, instead of router.prefill_backlog_tokens: what waits
    there is computed before whatever comes. More: prompts that are short are computed faster; less: tenants wait less for each other."""
    metric_labels: Natural = 50
    """Tenants that have a label of their own in /metrics: those that came first since the start. Others are told as `other`."""
    usage: UsageConfig = field(default_factory=UsageConfig)
    """The usage log."""

    @property
    def is_on(self) -> bool:
        return self.enabled or bool(self.file)
