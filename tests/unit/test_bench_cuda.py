"""The limits that bench/engine_cuda.py compares with, and what it says where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.usefixtures("bench")
def test_limits_of_the_21b_model_on_an_h200() -> None:
    from cuda_limits import Limits
    from engine_cuda import model_config

    limits = Limits(model_config(tiny=False, max_len=4096), value_bytes=2, bytes_per_s=4.3e12, flops_per_s=790e12)
    assert 1000 / limits.decode_tokens_per_s(1, 2048) == pytest.approx(1.6, abs=0.1)  # milliseconds
    assert limits.decode_tokens_per_s(64, 2048) == pytest.approx(5400, rel=0.02)
    assert limits.decode_tokens_per_s(256, 2048) == pytest.approx(14900, rel=0.02)
    assert limits.prefill_tokens_per_s(2048) == pytest.approx(122_000, rel=0.02)


@pytest.mark.usefixtures("bench")
def test_cases_without_a_figure_leave_their_cells_empty() -> None:
    from engine_cuda import table

    report = {"limit_tokens_per_s": {"decode/8": 200.0}, "tokens_per_s": {"baton": {"decode/8": 50.0}}}
    assert table(report).splitlines()[-1] == "| decode | 8 | 50.0 | 25.0% | - | - |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2() -> None:
    done = subprocess.run([sys.executable, str(BENCH / "engine_cuda.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "needs a GPU" in done.stderr
