"""The kernels' threads run each task once, whatever comes late, under a thread sanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.unit.test_model_native import needs_compiler
from workers.model.native.build import KERNELS, supported

SOURCE = Path(__file__).parents[2] / "workers" / "model" / "native" / "source"


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program pool_stress.cpp."""
    program = tmp_path_factory.mktemp("pool") / "stress"
    flags = (supported() or KERNELS.sets)[0].flags
    command = ["g++", "-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", *flags, f"-I{SOURCE}"]
    built = subprocess.run(
        [*command, str(Path(__file__).with_name("pool_stress.cpp")), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "tsan" in built.stderr:
        pytest.skip(f"the compiler has no thread sanitizer: {built.stderr[-200:]}")
    assert built.returncode == 0, built.stderr
    return program


@needs_compiler
@pytest.mark.parametrize("num_threads", [1, 2, 4, 8])
def test_each_task_runs_once_and_is_seen_whatever_the_number_of_threads(stress: Path, num_threads: int) -> None:
    """Eight threads are more than most machines of a test have, so some are always late."""
    done = subprocess.run([stress, str(num_threads), "500"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
