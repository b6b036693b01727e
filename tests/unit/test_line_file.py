"""Lines reach their file from a thread of its own; a disk that is full, gone or hung costs lines, which are counted, and holds nothing up."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from router.line_file import MAX_WAITING, LineFile, Rotation


def test_a_file_that_was_moved_away_is_made_anew(tmp_path: Path) -> None:
    path, moved = tmp_path / "log", tmp_path / "log.1"
    lines = LineFile(str(path), "lines")
    path.rename(moved)
    lines.write("after")
    lines.close()
    assert path.read_text() == "after\n" and not moved.read_text()


@pytest.mark.parametrize("rotation", [None, Rotation(1 << 20, 2)])
def test_a_disk_that_hangs_costs_lines_and_keeps_nobody_from_ending(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rotation: Rotation | None
) -> None:
    path = tmp_path / "log"
    os.mkfifo(path)
    disk = os.open(path, os.O_RDWR)  # takes what a pipe holds, and no more
    lines = LineFile(str(path), "lines", rotation)
    for number in range(2 * MAX_WAITING):
        lines.write(f"{number:0128}")
    assert lines.num_lost > MAX_WAITING // 2
    lines.close(timeout_s=0.1)
    assert "lines come faster than the disk takes them" in caplog.text and "the disk takes nothing" in caplog.text
    path.unlink()
    os.close(disk)


@pytest.mark.parametrize("rotation", [None, Rotation(1 << 20, 2)])
def test_a_disk_that_takes_lines_again_hears_how_many_were_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rotation: Rotation | None
) -> None:
    full, path = tmp_path / "full", tmp_path / "log"
    os.symlink("/dev/full", path)
    lines = LineFile(str(path), "lines", rotation)
    lines.write("lost")
    while not lines.num_lost:
        os.sched_yield()
    path.rename(full)
    lines.write("kept")
    lines.close()
    told, kept = path.read_text().splitlines()
    assert json.loads(told)["lost_lines"] == lines.num_lost == 1 and kept == "kept"
    assert "No space left" in caplog.text
