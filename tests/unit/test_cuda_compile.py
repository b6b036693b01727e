"""Triton compiles the kernels for GPUs of two generations, on any machine, and they fit into shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {89: 99 << 10, 90: 227 << 10}
"""What one program may use: L40S, which has least, and H100 or H200."""


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_compiles_in_bf16_and_fits(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "unit" / "compile_kernels.py"), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    shared_bytes = json.loads(done.stdout.splitlines()[-1])
    assert len(shared_bytes) == 9
    assert max(shared_bytes.values()) <= SHARED_BYTES[capability], shared_bytes
