"""What actors write to their logs, which Ray keeps under each actor's name: one line or one JSON object a message, with the name of the
worker or router and, where the message is about a request, its id and trace."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

from cluster.config import LogConfig
from workers.log_context import logged_about

PACKAGES = ("cluster", "router", "workers")
"""Whose messages `log.level` is about; of other packages warnings are written."""


class Formatter(logging.Formatter):
    """Of one process, whose worker or router has `name`."""

    def __init__(self, name: str, is_json: bool) -> None:
        super().__init__()
        self._name, self._is_json = name, is_json

    def format(self, record: logging.LogRecord) -> str:
        """Messages may quote what clients and peers sent: they stay on one line, and JSON stays JSON."""
        about = _about(record)
        stack = self.formatException(record.exc_info) if record.exc_info else ""
        seconds = time.gmtime(record.created)
        moment = f"{time.strftime('%Y-%m-%dT%H:%M:%S', seconds)}.{int(record.msecs):03d}Z"
        if self._is_json:
            entry = {
                "time": moment,
                "level": record.levelname.lower(),
                "name": self._name,
                "logger": record.name,
                "message": record.getMessage(),
                **about,
                **({"exception": stack} if stack else {}),
            }
            return json.dumps(entry, ensure_ascii=False)
        where = "".join(f" {key}={value}" for key, value in about.items())
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        return f"{moment} {record.levelname:<7} {self._name}{where} {message}" + (f"\n{stack}" if stack else "")


def _about(record: logging.LogRecord) -> dict[str, str]:
    """Of the request that a message says it is about, or else the task that writes it; see workers.request.Request.log_fields."""
    named: dict[str, Any] = record.__dict__ if hasattr(record, "request_id") else {**logged_about()}
    trace = str(named.get("traceparent") or "").split("-")
    return {
        **({"request_id": str(named["request_id"])} if named.get("request_id") else {}),
        **({"trace_id": trace[1]} if len(trace) == 4 else {}),
    }


def write_logs(config: LogConfig, name: str, stream: TextIO | None = None) -> None:
    """From now on this process writes its messages so, to standard error: Ray keeps that in a file of the actor's."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Formatter(name, config.format == "json"))
    root = logging.getLogger()
    root.handlers[:] = [other for other in root.handlers if not isinstance(other.formatter, Formatter)] + [handler]
    root.setLevel(logging.WARNING)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(config.level.upper())
