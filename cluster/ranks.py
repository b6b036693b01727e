"""The Ray actor of a worker's further ranks: it finds the leader by name, and follows it for as long as there is one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.actors import Actor, leave_for_good
from cluster.placement import rank_name
from workers.config import WorkerConfig

log = logging.getLogger(__name__)
