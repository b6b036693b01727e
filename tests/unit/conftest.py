"""The HTTP API over a FakeBackend, served once for each test file that asks for `api`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fake_backend import Api


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest) -> Iterator[Api]:
    """With the file's API_CONFIG, where it has one."""
    from fake_backend import open_api  # most test files have no use for its imports

    with open_api(getattr(request.module, "API_CONFIG", None)) as api:
        yield api


@pytest.fixture
def api(served: Api) -> Api:
    """As new for every test."""
    served.backend.reset()
    return served
