"""Runs the chart's pods on this machine: each as the processes of its containers, with a loopback address of its own.

From the rendered manifests it takes init containers, arguments, environment, ConfigMaps, Secrets and emptyDirs (as folders, whose mount
paths are replaced wherever they are named), probes, preStop, SIGTERM and grace. It is not Kubernetes: processes share this machine's
file system, user, network and images, names of Services are replaced by addresses, nobody restarts what ends, and NetworkPolicies
are not applied.
"""

from __future__ import annotations

import base64
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import Any

from chart_render import component, pods, render
from cluster_process import MODEL, ROOT, free_port, wait_until
from redis_server import RedisServer

Object = dict[str, Any]
STARTED_S = 200


class ChartPods:
    """The pods of one render. Redis is this machine's, with the password of the release's Secret."""

    def __init__(self, case: str, *settings: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bp-", dir="/tmp"))  # Ray's sockets need a short path
        sets = [part for setting in settings for part in ("--set", setting)]
        self._objects = render(case, 4, *sets)
        self._templates = {
            template["metadata"]["labels"].get("baton.dev/pool") or component(template): template
            for _, template in pods(self._objects)
        }
        self._data = {(each["kind"], each["metadata"]["name"]): each.get("data", {}) for each in self._objects}
        self.redis = RedisServer(self.folder, "--requirepass", self.secret("baton-secrets", "redis-password"))
        self.redis.start()
        self.http_port, self.gcs_port = free_port(), free_port()
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._grace: dict[str, int] = {}
        self._pre_stop: dict[str, list[str]] = {}
        self._probes: dict[str, str] = {}
        self._said: dict[str, deque[str]] = {}

    def secret(self, name: str, key: str) -> str:
        return base64.b64decode(self._data["Secret", name][key]).decode()

    def start(self, name: str, address: str, head: str) -> str:
        """Starts a pod of a component or pool; returns its name. Its init containers end before."""
        template, pod = self._templates[name], f"baton-{name}-{secrets.token_hex(3)}"
        spec = template["spec"]
        own = self.folder / pod
        own.mkdir()
        places = {volume["name"]: self._volume(own, volume, head) for volume in spec["volumes"]}
        fields = {"metadata.name": pod, "status.podIP": address}
        for container in spec.get("initContainers", []):
            command, environment = self._command(container, places, fields, own)
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
        (container,) = spec["containers"]
        command, environment = self._command(container, places, fields, own)
        if name == "router":  # on every address of the pod, which here would be every address of the machine
            command = [part.replace("--host=0.0.0.0", f"--host={address}") for part in command] + [
                f"--port={self.http_port}"
            ]
        if name == "ray-head":
            command = [part.replace("=0.0.0.0", f"={address}") for part in command]
            command += [f"--port={self.gcs_port}"]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._processes[pod], lines, stdout = process, self._said.setdefault(pod, deque(maxlen=200)), process.stdout
        assert stdout is not None
        threading.Thread(target=lambda: lines.extend(stdout), daemon=True).start()
        ports = {port["name"]: port["containerPort"] for port in container["ports"]} | {"http": self.http_port}
        probe = container["startupProbe"]["httpGet"]
        self._probes[pod] = f"http://{address}:{ports[probe['port']]}{probe['path']}"
        self._grace[pod] = spec["terminationGracePeriodSeconds"]
        self._pre_stop[pod] = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        return pod

    def wait(self, pod: str, path: str = "", status: int = 200) -> None:
        """Until its startup probe, or another path, has been answered with the status."""
        import urllib.error
        import urllib.request

        url = re.sub(r"/\w+$", path, self._probes[pod]) if path else self._probes[pod]

        def answered() -> bool:
            assert self._processes[pod].poll() is None, self.everything()
            try:
                with urllib.request.urlopen(url, timeout=10) as answer:
                    return bool(answer.status == status)
            except urllib.error.HTTPError as error:
                return error.code == status
            except OSError:
                return False

        wait_until(answered, STARTED_S, f"{url} to say {status}", self.everything)

    def end(self, pod: str) -> int:
        """As kubelet does: preStop, SIGTERM to the first process alone, and SIGKILL after the grace. Returns the exit code."""
        if self._pre_stop[pod]:
            subprocess.run(self._pre_stop[pod], check=True)
        process = self._processes.pop(pod)
        process.send_signal(signal.SIGTERM)
        return process.wait(self._grace[pod])

    def kill(self, pod: str) -> None:
        """Every process of it, at once."""
        process = self._processes.pop(pod)
        for pid in _descendants(process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait(10)

    def uninstall(self) -> str:
        """What a cleanup job does."""
        command = [sys.executable, "-m", "cluster.cli", "store", "clear", f"--config={self.folder}/last.yaml"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        for pod, process in list(self._processes.items()):
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                self.kill(pod)
        self.redis.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def everything(self) -> str:
        return "\n".join(f"== {pod}\n{''.join(lines)}" for pod, lines in self._said.items())

    def _volume(self, own: Path, volume: Object, head: str) -> Path:
        if volume["name"] == "tmp":  # Ray's sockets need a short path
            return Path(tempfile.mkdtemp(prefix="", dir=self.folder))
        place = own / volume["name"]
        place.mkdir()
        for kind, field, key in (("ConfigMap", "configMap", "name"), ("Secret", "secret", "secretName")):
            if field not in volume:
                continue
            data = self._data[kind, volume[field][key]]
            for name in [item["key"] for item in volume[field].get("items", [])] or list(data):
                text = base64.b64decode(data[name]).decode() if kind == "Secret" else self._named(data[name], head)
                (place / name).write_text(text)
                (place / name).chmod(0o600)
        return place

    def _named(self, text: str, head: str) -> str:
        """With addresses of this machine in place of names of Services, and this checkout's model."""
        text = text.replace("baton-redis:6379", f"127.0.0.1:{self.redis.port}").replace(
            "baton-ray:6379", f"{head}:{self.gcs_port}"
        )
        return text.replace("/opt/baton/models/ernie-4.5-tiny", str(MODEL))

    def _command(
        self, container: Object, places: dict[str, Path], fields: dict[str, str], own: Path
    ) -> tuple[list[str], dict[str, str]]:
        """With the container's mounts in place of their paths, in arguments and in the settings that it reads."""
        mounts = {
            m["mountPath"]: places[m["name"]]
            for m in container["volumeMounts"]
            if m["mountPath"] not in ("/tmp", "/dev/shm")
        }

        def moved(text: str) -> str:
            for path, place in mounts.items():
                text = re.sub(rf"(?<![\w/.-]){re.escape(path)}(?=[/\s\"']|$)", str(place), text)
            return text

        for place in mounts.values():
            for file in place.glob("*.yaml"):
                file.write_text(moved(file.read_text()))
                shutil.copy(file, self.folder / "last.yaml")
        environment = {**os.environ, "TMPDIR": str(places["tmp"])}
        for variable in container["env"]:
            source = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            environment[variable["name"]] = fields[source] if source else moved(variable["value"])
        environment["HOME"] = str(places["tmp"])
        names = {"$(POD_NAME)": fields["metadata.name"], "$(POD_IP)": fields["status.podIP"]}
        arguments = []
        for part in container["args"]:
            for variable, value in names.items():
                part = str(part).replace(variable, value)
            arguments.append(moved(part))
        head = next(
            iter(set(re.findall(r"address: (\S+):", "".join(p.read_text() for p in own.glob("config/*.yaml"))))), ""
        )
        arguments = [self._named(part, head) for part in arguments]
        return [sys.executable, "-m", "cluster.cli", *arguments], environment


def _descendants(pid: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found
