"""Spans reach a collector by OTLP: here a receiver in this process, and a process that sends as a router's does."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from workers.errors import InvalidConfig
from workers.trace_export import TraceExport

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SENDER = """
import sys
from workers.trace_export import TraceExport
from workers.tracing import start_span
export = TraceExport(sys.argv[1], "baton-router", "router-0")
request = start_span("request", sys.argv[2])
start_span("queue", request.traceparent).end()
request.end()
export.close()
"""
"""A provider is a process' for good, so that sending has a process of its own."""


@pytest.fixture
def received() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """URL of a collector, and path and body of what it was sent."""
    found: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            found.append((self.path, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", found
    server.shutdown()
    server.server_close()


def send(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SENDER, url, PARENT], capture_output=True, text=True, timeout=60)


def test_spans_reach_the_collector_below_the_clients_own(received: tuple[str, list[tuple[str, bytes]]]) -> None:
    url, found = received
    done = send(url)
    assert done.returncode == 0, done.stderr
    assert {path for path, _ in found} == {"/v1/traces"}
    spans = {}
    for _, body in found:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert names["service.name"] == "baton-router" and names["service.instance.id"] == "router-0"
            spans |= {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert set(spans) == {"request", "queue"}
    assert {span.trace_id.hex() for span in spans.values()} == {PARENT.split("-")[1]}
    assert spans["request"].parent_span_id.hex() == PARENT.split("-")[2]
    assert spans["queue"].parent_span_id == spans["request"].span_id


def test_a_collector_that_is_away_ends_nothing() -> None:
    assert send("http://127.0.0.1:9").returncode == 0


def test_what_is_no_url_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="otlp_endpoint must be the http"):
        TraceExport("collector:4317", "baton-router", "router-0")
