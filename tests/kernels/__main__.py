"""Prints what the kernels compute on every instruction set that can be run here, emulated ones included: all lines must agree.

python -m tests.kernels   from the root of the repository, or `make kernels-emulated`
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.kernels.builds import EMULATED, Build, Missing, native, sanitized


def main() -> int:
    expected: list[str] = []
    with tempfile.TemporaryDirectory() as folder:

        def lines_of(build: Build, *arguments: str) -> list[str]:
            try:
                return build.run(build.compile(Path(folder)), *arguments)
            except Missing as error:
                print(f"{build.name}: left out, {error} is not installed")
                return []

        for build in (*native(), *EMULATED.values()):
            lines = lines_of(build)
            if not lines:
                continue
            expected = expected or lines
            print(f"{build.name}: {'same bits' if lines == expected else 'OTHER BITS'}", flush=True)
            if lines != expected:
                print(*lines, sep="\n")
                return 1
        lines_of(sanitized(), "hostile", "1")
    print(*expected, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
