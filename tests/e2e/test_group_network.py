"""Ranks that see one another only over a network interface: two namespaces on this machine, joined by a cable."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from cluster_process import ROOT

pytestmark = pytest.mark.timeout(300)
NOT_PERMITTED = 3


def test_ranks_over_an_interface_compute_and_hand_over_what_one_rank_does() -> None:
    """Without Ray: its processes in namespaces of their own would test Ray. The second rank cannot map the leader's memory."""
    done = subprocess.run(
        [sys.executable, "bench/group_network.py"], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    if done.returncode == NOT_PERMITTED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens_equal_one_rank"]
    assert found["kv_blocks_equal_one_rank"] == found["kv_blocks"] > 0, "exposed, its blocks are those of one rank"
    assert found["adopted_heads_came_back"]
    assert found["ranks_in_leaders_memory"] == [True, False]
    least = found["kv_bytes_between_hosts"] + found["expert_row_bytes"]
    assert found["interface_bytes"] > least, "experts' rows and KV went over the interface"
