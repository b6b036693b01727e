"""What installs the programs of these tests: once, however many ask, and with a reason where it cannot."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kube_tools
import pytest


def test_of_two_that_want_a_program_at_once_one_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_tools, "FOLDER", tmp_path / "kube")
    path = tmp_path / "kube" / "program"

    def want(_: int) -> bool:
        with kube_tools._installing(path) as coming:
            if coming is not None:
                (coming / "program").write_text("whole")
                (coming / "program").rename(path)
            assert path.read_text() == "whole"
            return coming is not None

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(want, range(8))) == 1


def test_what_cannot_be_had_says_what_failed() -> None:
    with pytest.raises(kube_tools.NotToBeHad, match="there is no nowhere-to-be-found here"):
        kube_tools._run(["nowhere-to-be-found", "install"])
    with pytest.raises(kube_tools.NotToBeHad, match="`sh -c echo no route >&2; exit 3` failed: no route"):
        kube_tools._run(["sh", "-c", "echo no route >&2; exit 3"])
