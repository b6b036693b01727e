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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `pytest -n 2 --dist loadgroup`: the end-to-end tests, which share a cluster, run in one process, and so do the tests of
    any other file. What takes minutes begins first, so that no process is left alone with it at the end.
    """
    slow = ("test_cli_serve.py", "test_cluster_actors.py", "test_native_instruction_sets.py")

    def has_cluster(item: pytest.Item) -> bool:
        return item.path.parent.name == "e2e" or item.path.name == "test_chart_pods.py"

    def order(item: pytest.Item) -> int:
        return 0 if has_cluster(item) else 1 if item.path.name in slow else 2

    items.sort(key=order)
    for item in items:
        group = "e2e" if has_cluster(item) else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
