"""Sends a process's spans to a collector by OTLP over HTTP, where the settings name one and the packages are installed."""

from __future__ import annotations

import logging
from typing import Any

from workers.errors import InvalidConfig

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
MAX_QUEUED_SPANS = 4096
"""That wait to be sent; further ones are dropped: a collector that is away costs memory of so many, and no request any time."""
_PATH = "/v1/traces"


class TraceExport:
    """The spans of this process, from now on; one for a process. `service` and `name` say whose they are.

    Raises InvalidConfig when it is no URL, or the packages are missing. A provider that somebody else has set is left in place, and asked to send too.
    """

    def __init__(self, endpoint: str, service: str, name: str) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise InvalidConfig(
                f"otlp_endpoint must be the http:// or https:// URL of an OTLP collector; it is {endpoint!r}"
            )
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise InvalidConfig(f"otlp_endpoint needs pip install 'baton-serve[tracing]' ({error})") from error
        url = endpoint if endpoint.rstrip("/").endswith(_PATH) else endpoint.rstrip("/") + _PATH
        self._processor: Any = BatchSpanProcessor(
            OTLPSpanExporter(endpoint=url, timeout=TIMEOUT_S), max_queue_size=MAX_QUEUED_SPANS
        )
        provider: Any = trace.get_tracer_provider()
        if not isinstance(provider, TracerProvider):
            provider = TracerProvider(resource=Resource.create({"service.name": service, "service.instance.id": name}))
            trace.set_tracer_provider(provider)
        provider.add_span_processor(self._processor)
        log.info("%s sends its spans to %s", name, url)

    def close(self) -> None:
        """Sends what waits, for TIMEOUT_S at most."""
        self._processor.force_flush(int(TIMEOUT_S * 1000))
        self._processor.shutdown()
