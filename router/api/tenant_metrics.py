"""What tenants ask for and get, in Prometheus form, with a bounded number of labels; it holds numbers and decides nothing."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

OTHER = "other"


class TenantMetrics:
    """The first `max_labels` tenants have a label each; clients do not make up names of tenants, but operators make many."""

    def __init__(self, registry: CollectorRegistry, max_labels: int, is_alone: Callable[[], bool]) -> None:
        alone = Gauge(
            "baton_tenant_allowances_alone",
            "1 while the common store does not answer, and this router grants tenants' allowances by itself",
            registry=registry,
        )
        alone.set_function(is_alone)
        self._max_labels = max_labels
        self._named: set[str] = set()
        self._requests = Counter(
            "baton_tenant_requests", "Requests of a tenant that ran", ("tenant", "outcome"), registry=registry
        )
        self._tokens = Counter(
            "baton_tenant_tokens", "Tokens of a tenant's requests", ("tenant", "kind"), registry=registry
        )
        self._limited = Counter(
            "baton_tenant_limited",
            "Requests that a tenant's allowance did not reach for",
            ("tenant", "limit"),
            registry=registry,
        )

    def ended(self, tenant: str, outcome: str, num_input: int, num_cached: int, num_output: int) -> None:
        """`outcome` is ok, a refusal or client_disconnected."""
        label = self._label(tenant)
        self._requests.labels(label, outcome).inc()
        for kind, count in (("input", num_input), ("cached", num_cached), ("output", num_output)):
            self._tokens.labels(label, kind).inc(count)

    def limited(self, tenant: str, limit: str) -> None:
        self._limited.labels(self._label(tenant), limit).inc()

    def _label(self, tenant: str) -> str:
        if tenant not in self._named:
            if len(self._named) >= self._max_labels:
                return OTHER
            self._named.add(tenant)
        return tenant
