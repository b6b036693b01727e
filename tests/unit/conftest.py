"""The HTTP API over a FakeBackend, served once for each test file that asks for `api`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fake_backend import Api


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest) -> Iterator[Api]:
    """With the file's API_CONFIG, where it has one; API_THINKS: a model that thinks and calls tools."""
    from fake_backend import CHECKPOINT, open_api  # most test files have no use for its imports

    thinks = getattr(request.module, "API_THINKS", False)
    checkpoint = request.getfixturevalue("thinking_folder") if thinks else CHECKPOINT
    with open_api(getattr(request.module, "API_CONFIG", None), checkpoint=checkpoint) as api:
        yield api


@pytest.fixture(scope="session")
def thinking_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from thinking_checkpoint import make

    return make(tmp_path_factory.mktemp("thinking"))


@pytest.fixture
def api(served: Api) -> Api:
    """As new for every test."""
    served.backend.reset()
    return served
