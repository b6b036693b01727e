"""The life of one pod as kubelet leads it: volumes, init containers, the container with its probes and restarts, and an end in order."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pod_container import Container, Mount
from pod_firewall import Endpoint
from pod_image import Image
from pod_network import PodNetwork
from pod_probes import Probe, ask
from pod_volumes import make_claim, make_volume

Object = dict[str, Any]
_TICK_S = 0.2
_BACK_OFF_S = (0.0, 2.0, 4.0, 8.0)
"""Before each restart of a container in a row; kubelet's are 10 times as long."""


def template_hash(template: Object) -> str:
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:8]


class Pod:
    """A thread leads it; other threads read its state and ask for its end.

    `phase` goes from Pending over Running to Succeeded or Failed, or to Gone after end(). One container beside init containers.
    """

    def __init__(
        self,
        name: str,
        owner: str,
        node: str,
        template: Object,
        data: Mapping[tuple[str, str], Object],
        image: Image,
        network: PodNetwork,
        folders: tuple[Path, Path, Path],
        hosts: Path,
    ) -> None:
        """`folders`: on disk, in memory, and that of claims."""
        self.name, self.owner, self.node = name, owner, node
        self.hash = template_hash(template)
        self.labels: dict[str, str] = template["metadata"]["labels"]
        self.spec: Object = template["spec"]
        (self._container,) = self.spec["containers"]
        self.ports = {port["name"]: port["containerPort"] for port in self._container.get("ports", [])}
        self.phase = "Pending"
        self.restarts = 0
        self.exit_codes: list[int] = []
        self.was_killed = False
        """Its grace ran out."""
        self.is_deleting = False
        self._is_ready = False
        self._data, self._image, self._network, self._hosts = data, image, network, hosts
        disk, memory, self._claims = folders
        self._folder, self._memory = disk / name, memory / name
        self._ending = threading.Event()
        self._running: Container | None = None
        self.log = disk / f"{name}.log"
        self._namespace, self.address = network.attach()
        self.thread = network.thread(self._live, name)

    @property
    def is_ready(self) -> bool:
        return self._is_ready and not self.is_deleting

    def endpoint(self) -> Endpoint:
        return Endpoint(self.name, self.address, self.labels, self.ports, self.is_ready)

    def end(self) -> None:
        """Deletes it, as `kubectl delete pod` does; the thread goes on until all is gone."""
        self.is_deleting = True
        self._ending.set()

    def crash(self) -> None:
        """Kills every process of its container at once. Its kubelet will notice."""
        if self._running is not None:
            self._running.kill()

    def execute(self, command: list[str], timeout_s: float = 60) -> str:
        """What a command in the container prints."""
        assert self._running is not None, f"{self.name} does not run"
        done = self._running.execute(command, timeout_s)
        assert done is not None and done.returncode == 0, f"{command} in {self.name}: {done}"
        return done.stdout

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _live(self) -> None:
        try:
            self._folder.mkdir()
            self._memory.mkdir()
            group = self.spec["securityContext"].get("fsGroup", 0)
            claims = {template["metadata"]["name"] for template in self.spec.get("claims", [])}
            self._places = {name: make_claim(self._claims / f"{name}-{self.name}", group) for name in claims}
            for volume in self.spec.get("volumes", []):
                self._places[volume["name"]] = make_volume(self._folder, self._memory, volume, self._data, group)
            if self._initialised():
                self._run()
        except Exception as error:
            with self.log.open("a") as file:
                file.write(f"pod runner: {type(error).__name__}: {error}\n")
            self.phase = "Failed"
        finally:
            self._is_ready = False
            if self._running is not None and self._running.poll() is None:
                self._running.kill()
            for folder in (self._folder, self._memory):
                shutil.rmtree(folder, ignore_errors=True)
            self._network.detach(self._namespace)
            if self.is_deleting:
                self.phase = "Gone"

    def _initialised(self) -> bool:
        """Runs the init containers one after the other; False when the pod ends before."""
        for container in self.spec.get("initContainers", []):
            for attempt in range(len(_BACK_OFF_S)):
                if self._ending.wait(_BACK_OFF_S[attempt]):
                    return False
                self._running = self._started(container)
                while self._running.poll() is None:
                    if self._ending.wait(_TICK_S / 4):
                        self._terminate(container)
                        return False
                if self._running.poll() == 0:
                    break
            else:
                raise AssertionError(f"init container {container['name']} failed {len(_BACK_OFF_S)} times")
        return True

    def _run(self) -> None:
        in_a_row = 0
        while not self._ending.wait(_BACK_OFF_S[min(in_a_row, len(_BACK_OFF_S) - 1)] if in_a_row else 0):
            self._running = self._started(self._container)
            self.phase = "Running"
            was_ready = self._watch(self._running)
            self._is_ready = False
            if self.is_deleting:
                self._terminate(self._container)
            code = self._running.wait(10)
            self.exit_codes.append(code if code is not None else -signal.SIGKILL)
            if self.is_deleting:
                return
            if self.spec.get("restartPolicy", "Always") == "Never" or (
                code == 0 and self.spec.get("restartPolicy") == "OnFailure"
            ):
                self.phase = "Failed" if code else "Succeeded"
                return
            self.restarts += 1
            in_a_row = 0 if was_ready else in_a_row + 1
            with self.log.open("a") as file:
                file.write(f"pod runner: the container ended with {code}; restart {self.restarts}\n")

    def _watch(self, container: Container) -> bool:
        """Until the container has ended, or the pod is to end. Returns whether it was ready once."""
        now = time.monotonic()
        kinds = {
            kind: Probe(self._container[kind], now)
            for kind in ("startupProbe", "readinessProbe", "livenessProbe")
            if kind in self._container
        }
        startup = kinds.pop("startupProbe", None)
        if "readinessProbe" not in kinds and startup is None:
            self._is_ready = True
        was_ready = False
        while container.poll() is None and not self._ending.wait(_TICK_S):
            if startup is not None and startup.passes is None:
                self._probe(container, startup)
                if startup.passes is False:
                    self._terminate(self._container)
                continue
            for kind, probe in kinds.items():
                self._probe(container, probe)
                if kind == "livenessProbe" and probe.passes is False:
                    self._is_ready = False
                    self._terminate(self._container)
                    break
            if "readinessProbe" in kinds:
                self._is_ready = kinds["readinessProbe"].passes is True
            was_ready = was_ready or self._is_ready
        return was_ready

    def _probe(self, container: Container, probe: Probe) -> None:
        if probe.is_due(time.monotonic()):

            def execute(command: list[str], timeout_s: float) -> bool:
                done = container.execute(command, timeout_s)
                return done is not None and done.returncode == 0

            probe.answered(ask(probe.spec, self.address, self.ports, execute), time.monotonic())

    def _terminate(self, spec: Object) -> None:
        """preStop, SIGTERM, and SIGKILL when the grace is over; the grace counts from the hook's start."""
        container = self._running
        assert container is not None
        deadline = time.monotonic() + self.spec.get("terminationGracePeriodSeconds", 30)
        hook = spec.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        if hook and container.poll() is None:
            container.execute(hook, max(0.0, deadline - time.monotonic()))
        container.signal(signal.SIGTERM)
        if container.wait(max(2.0, deadline - time.monotonic())) is None:
            self.was_killed = True
            container.kill()

    def _started(self, container: Object) -> Container:
        fields = {"metadata.name": self.name, "status.podIP": self.address, "spec.nodeName": self.node}
        environment = {}
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {})
            assert set(source) <= {"fieldRef"}, f"the pod runner does not know {source}"
            environment[variable["name"]] = fields[source["fieldRef"]["fieldPath"]] if source else variable["value"]
        arguments = [_expanded(str(part), environment) for part in container.get("args", [])]
        mounts = [Mount(source, path, True) for path, source in self._image.mounts.items()]
        mounts.append(Mount(self._hosts, "/etc/hosts", True))
        for mount in container.get("volumeMounts", []):
            mounts.append(Mount(self._places[mount["name"]], mount["mountPath"], bool(mount.get("readOnly"))))
        root = self._folder / f"root-{container['name']}"
        root.mkdir(exist_ok=True)
        return Container(
            self._image.command(container, arguments),
            environment,
            mounts,
            {**self.spec["securityContext"], **container["securityContext"]},
            self._namespace,
            root,
            self.log,
        )


def _expanded(text: str, environment: dict[str, str]) -> str:
    """$(NAME) as Kubernetes fills it in."""
    return re.sub(r"\$\((\w+)\)", lambda found: environment.get(found[1], found[0]), text)
