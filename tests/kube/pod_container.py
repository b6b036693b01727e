"""Starts a container: namespaces of its own, a root file system of mounts that can be read only, its user, and no privileges.

Not there: control groups (limits of memory and processors), seccomp, user namespaces, images.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pod_image import ENVIRONMENT

_ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "nsswitch.conf", "ssl", "mime.types", "localtime", "alternatives")


@dataclass(frozen=True)
class Mount:
    source: Path
    path: str
    read_only: bool


class Container:
    """A running one. `log` has what it says."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        mounts: list[Mount],
        security: dict[str, Any],
        namespace: str,
        root: Path,
        log: Path,
    ) -> None:
        """`security` is the pod's and the container's securityContext in one; `root` an empty folder for its file system."""
        self._user = _user_flags(security)
        script = "\n".join(_mounting(root, mounts, bool(security.get("readOnlyRootFilesystem"))))
        script += f"\nexec {_program('chroot')} {root} /usr/bin/setpriv {' '.join(self._user)} -- {shlex.join(command)}"
        outer = [_program("nsenter"), f"--net=/run/netns/{namespace}", _program("unshare")]
        outer += ["--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "sh", "-c", script]
        self._environment = {**ENVIRONMENT, **environment}
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                outer, env=self._environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        self._first = self._find_first()

    def poll(self) -> int | None:
        """The exit code, once every process of it is gone."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, number: int) -> None:
        """To process 1; SIGKILL ends all."""
        if self.poll() is None and self._first:
            try:
                os.kill(self._first, number)
            except ProcessLookupError:
                return

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait()

    def execute(self, command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str] | None:
        """As one more process of the container, of the same user; None when it took too long or the container is gone."""
        inside = [
            _program("nsenter"),
            f"--target={self._first}",
            "--mount",
            "--net",
            "--pid",
            "--ipc",
            "--uts",
            "--root",
        ]
        inside += ["--wd=/", "/usr/bin/setpriv", *self._user, "--", *command]
        try:
            return subprocess.run(inside, env=self._environment, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def _find_first(self) -> int:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        while self._process.poll() is None:
            try:
                if found := children.read_text().split():
                    return int(found[0])
            except OSError:
                break
            time.sleep(0.005)
        return 0


def _user_flags(security: dict[str, Any]) -> list[str]:
    flags = ["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]
    assert security["capabilities"] == {"drop": ["ALL"]}, "the pod runner knows containers without capabilities only"
    if security.get("allowPrivilegeEscalation") is False:
        flags.append("--no-new-privs")
    if "runAsUser" in security:
        flags += [f"--reuid={security['runAsUser']}", f"--regid={security['runAsGroup']}"]
        flags += [f"--groups={security.get('fsGroup', security['runAsGroup'])}"]
    return flags


def _mounting(root: Path, mounts: list[Mount], read_only: bool) -> list[str]:
    """Lines of a shell: what a container of Debian with Python would have, then the pod's own mounts."""
    quoted = shlex.quote
    lines = ["set -e", "mount --make-rprivate /", f"mount -t tmpfs -o mode=755 tmpfs {root}", f"cd {root}"]
    lines += ["mkdir -p usr etc dev/shm proc sys tmp run var/tmp", "mount -o bind,ro /usr usr"]
    for name in ("bin", "sbin", "lib", "lib64"):
        lines.append(
            f"if [ -L /{name} ]; then cp -P /{name} {name}; elif [ -d /{name} ]; then mkdir {name}; mount -o bind,ro /{name} {name}; fi"
        )
    lines += [f"if [ -e /etc/{name} ]; then cp -a /etc/{name} etc/; fi" for name in _ETC]
    lines += ["printf 'root:x:0:0::/:/bin/sh\\nbaton:x:10001:10001::/tmp:/bin/sh\\n' > etc/passwd"]
    lines += ["printf 'root:x:0:\\nbaton:x:10001:\\n' > etc/group", ": > etc/hosts", ": > etc/resolv.conf"]
    lines += ["mount -t proc proc proc", "mount -o bind,ro /sys sys"]
    lines += [
        f": > dev/{name}; mount --bind /dev/{name} dev/{name}" for name in ("null", "zero", "full", "random", "urandom")
    ]
    lines += ["ln -s /proc/self/fd dev/fd", "mount -t tmpfs -o mode=1777,size=64m shm dev/shm"]
    for mount in sorted(mounts, key=lambda mount: mount.path.count("/")):
        place = quoted(mount.path.lstrip("/"))
        if mount.source.is_dir():
            lines.append(f"mkdir -p {place}")
        else:
            lines.append(f"mkdir -p {quoted(str(Path(mount.path.lstrip('/')).parent))}; : >> {place}")
        lines.append(f"mount -o bind{',ro' if mount.read_only else ''} {quoted(str(mount.source))} {place}")
    if read_only:
        lines.append("mount -o remount,ro .")
    return lines


def _program(name: str) -> str:
    found = shutil.which(name)
    assert found, name
    return found
