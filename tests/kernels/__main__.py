"""Prints what the kernels compute on every instruction set that can be run here, emulated ones included: lines of the same arithmetic must agree.

python -m tests.kernels   from the root of the repository, or `make kernels-emulated`
"""

from __future__ import annotations

import sys

from tests.kernels.builds import EMULATED, Build, Missing, by_case, native, sanitized


def main() -> int:
    expected: dict[str, str] = {}

    def lines_of(build: Build, *arguments: str) -> list[str]:
        try:
            return build.run(build.compile(), *arguments)
        except Missing as error:
            print(f"{build.name}: left out, {error} is not installed")
            return []

    for build in (*native(), *EMULATED.values()):
        lines = lines_of(build)
        if not lines:
            continue
        found = by_case(lines)
        differ = [case for case, hashes in found.items() if expected.setdefault(case, hashes) != hashes]
        print(f"{build.name}: {'OTHER BITS: ' + ', '.join(differ) if differ else 'same bits'}", flush=True)
        if differ:
            return 1
    lines_of(sanitized(), "hostile", "1")
    for case, hashes in expected.items():
        print(case, hashes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
