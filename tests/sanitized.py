"""Runs tests in a process of their own with the C++ kernels under AddressSanitizer and UBSan, which end it at the first error.

python tests/sanitized.py tests/unit/test_kv_checksum.py -k alignment   runs what pytest is told in this way
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def missing_for_sanitizers() -> str | None:
    """Why nothing can run under the sanitizers here; None where it can."""
    if shutil.which("g++") is None:
        return "the sanitizers need g++"
    absent = [name for name in ("libasan.so", "libubsan.so") if not Path(_library(name)).is_absolute()]
    return f"g++ has no {' and no '.join(absent)}" if absent else None


def run_sanitized(*arguments: str, timeout_s: float = 1200) -> subprocess.CompletedProcess[str]:
    """pytest with `arguments`, capturing nothing, as the process may end in the middle; its output is in `stdout`, and names the line of an error. Raises TimeoutExpired."""
    # The C++ library comes along because the sanitizer looks for the function that throws when the process starts.
    preloaded = [_library("libasan.so"), _library("libubsan.so"), _library("libstdc++.so")]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(preloaded),
        # Python frees nothing at its end, and torch mixes ways to allocate; neither is ours to judge.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "sanitized_kernels", "-p", "no:cacheprovider", "-s", *arguments],
        cwd=TESTS.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def _library(name: str) -> str:
    """Where g++ keeps it; the name alone where it has none."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    done = run_sanitized(*sys.argv[1:])
    print(done.stdout, end="")
    sys.exit(done.returncode)
