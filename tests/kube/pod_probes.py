"""Probes as kubelet makes them: what is asked, when, and what many answers in a row mean."""

from __future__ import annotations

import http.client
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]
Execute = Callable[[list[str], float], bool]
"""Runs a command in the container; whether it ended well in time."""


@dataclass
class Probe:
    """One probe of a running container; `passes` is None until as many answers in a row have said the same as it takes."""

    spec: Object
    started_at: float
    passes: bool | None = None
    _in_a_row: int = 0
    _last: bool = False
    _next_at: float = field(default=0.0)

    def __post_init__(self) -> None:
        self._next_at = self.started_at + self.spec.get("initialDelaySeconds", 0)

    def is_due(self, now: float) -> bool:
        return now >= self._next_at

    def answered(self, well: bool, now: float) -> None:
        self._in_a_row = self._in_a_row + 1 if well == self._last else 1
        self._last = well
        if self._in_a_row >= self.spec.get("successThreshold" if well else "failureThreshold", 1 if well else 3):
            self.passes = well
        self._next_at = now + self.spec.get("periodSeconds", 10)


def ask(probe: Object, address: str, ports: dict[str, int], execute: Execute) -> bool:
    """One answer, bounded by the probe's timeoutSeconds."""
    timeout_s = float(probe.get("timeoutSeconds", 1))
    if "exec" in probe:
        return execute(probe["exec"]["command"], timeout_s)
    get = probe["httpGet"]
    port = ports[get["port"]] if isinstance(get["port"], str) else get["port"]
    connection = http.client.HTTPConnection(address, port, timeout=timeout_s)
    try:
        connection.request("GET", get["path"], headers={"User-Agent": "kube-probe"})
        return 200 <= connection.getresponse().status < 400
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
