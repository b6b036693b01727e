"""The C++ under AddressSanitizer and UBSan: what ordinary tests do is clean, and an error would be seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from sanitized import missing_for_sanitizers, run_sanitized

pytestmark = [
    pytest.mark.skipif(missing_for_sanitizers() is not None, reason=str(missing_for_sanitizers())),
    pytest.mark.timeout(1500),
]


def test_checksums_touch_nothing_but_their_pieces() -> None:
    done = run_sanitized("tests/unit/test_kv_checksum.py", "-k", "many_pieces or every_native_length or alignment")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_a_read_beyond_a_buffer_ends_the_process_and_is_named(tmp_path: Path) -> None:
    test = tmp_path / "test_overrun.py"
    test.write_text(
        "import numpy as np\n"
        "from workers.kv_memory.checksum import library\n"
        "def test_overrun():\n"
        "    view = np.zeros(1000, np.uint8)\n"
        "    library().checksums([view.ctypes.data], [view.nbytes + 64])\n"
    )
    done = run_sanitized(str(test))
    assert done.returncode != 0
    # A read of 64 bytes that only ends beyond the buffer is an "unknown-crash", not a "heap-buffer-overflow".
    assert "ERROR: AddressSanitizer" in done.stdout and "checksum.cpp" in done.stdout
    assert "to the right of 1000-byte region" in done.stdout
