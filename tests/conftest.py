"""What all tests share: a Redis where one is asked for; kernels in Triton's interpreter on machines without a GPU; no time
limit for an example of hypothesis, which a busy machine would break."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from redis_server import RedisServer

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis of its own for each test file that asks for one."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()
