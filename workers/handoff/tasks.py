"""The tasks of handoffs that run until they end by themselves: one that raises is seen. Knows nothing of what they do."""

from __future__ import annotations

import asyncio
import logging

log = logging.getLogger(__name__)


def log_failure(task: asyncio.Task[None]) -> None:
    """A driver that raised has cleaned up behind itself; that it raised is our fault and must be seen."""
    if not task.cancelled() and task.exception() is not None:
        log.error("%s ended unexpectedly", task.get_name(), exc_info=task.exception())
