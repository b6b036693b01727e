"""The KV benchmark's ratios and verdicts, and a short run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import kv_targets  # noqa: E402


def test_a_ratio_is_taken_over_the_fastest_peer() -> None:
    figures = {"baton tcp": {"16 MiB": 1.0}, "nixl tcp": {"16 MiB": 2.0}, "mooncake": {"16 MiB": 0.5}}
    assert kv_targets.over(figures, "baton tcp", "16 MiB", "nixl tcp", "mooncake") == pytest.approx(0.5)
    assert kv_targets.over(figures, "baton tcp", "16 MiB", "raw gloo") is None


def test_a_target_whose_peer_is_missing_is_not_called_met() -> None:
    verdicts = {v.name: v for v in kv_targets.verdicts({"baton shm": {"256 MiB": 0.01, "21B block": 0.0005}})}
    assert verdicts["shm over memcpy, 256 MiB"].is_met is None
    assert verdicts["shm, p50 of a 21B block, ms"].is_met
    slow = {v.name: v for v in kv_targets.verdicts({"baton shm": {"21B block": 0.002}})}
    assert slow["shm, p50 of a 21B block, ms"].is_met is False


def test_a_run_names_the_peers_that_are_missing_and_how_to_install_them(tmp_path: Path) -> None:
    command = [
        sys.executable, str(BENCH / "kv_handoff.py"), "--quick", "--engines", "memcpy", "baton shm", "mooncake",
        "--peer-python", sys.executable, "--json", str(tmp_path / "r.json"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    assert set(results["figures"]) == {"memcpy", "baton shm"}
    assert "pip install" in results["engines"]["mooncake"]
    assert all(seconds > 0 for seconds in results["figures"]["baton shm"].values())
    assert "| baton shm" in done.stdout
