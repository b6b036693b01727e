"""Runs what a chart renders, on one machine and without Kubernetes: its Deployments, StatefulSets, Jobs and pods as containers of pod_container.py.

It is not Kubernetes. There is no API server, no scheduler that weighs resources, no image, no control group; names are found in /etc/hosts;
nodes are names. What is there is done as Kubernetes does it: see the other pod_*.py.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pod_firewall import Endpoint, ruleset
from pod_image import Image
from pod_life import Pod, template_hash
from pod_network import PodNetwork, enter
from pod_rollout import PodState, deployment_step, may_be_evicted, stateful_step

Object = dict[str, Any]
NODES = ("node-a", "node-b")
_TICK_S = 0.2
_WORKLOADS = ("Deployment", "StatefulSet")


class PodRunner:
    """`apply` says what is to be; a thread sees to it. Close it."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._disk = Path(tempfile.mkdtemp(prefix="baton-pods-", dir="/var/tmp"))
        self._disk.chmod(0o755)
        self._memory = Path(tempfile.mkdtemp(prefix="baton-pods-", dir="/dev/shm"))
        self._memory.chmod(0o755)
        self._image = Image(self._disk / "image")
        self._hosts = self._disk / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n")
        self.network = PodNetwork()
        self._lock = threading.RLock()
        self._objects: dict[tuple[str, str], Object] = {}
        self._addresses: dict[str, str] = {}
        self.pods: dict[str, Pod] = {}
        self.gone: list[Pod] = []
        self._cordoned: set[str] = set()
        self._rules = ""
        self._fault = ""
        self._closing = threading.Event()
        self._thread = self.network.thread(self._reconcile, "controllers")

    def apply(self, objects: Iterable[Object]) -> None:
        """Makes these the objects that there are; hooks are left to run_pod()."""
        with self._lock:
            self._objects = {(each["kind"], each["metadata"]["name"]): each for each in objects if not hooks(each)}
            for (kind, name), _ in self._objects.items():
                if kind == "Service":
                    self._addresses.setdefault(name, f"10.96.0.{len(self._addresses) + 1}")

    def objects(self) -> list[Object]:
        with self._lock:
            return list(self._objects.values())

    def wait_settled(self, timeout_s: float) -> None:
        """Until every workload has just its pods, of its newest template and ready, and nothing is ending."""
        self.wait(self._is_settled, timeout_s, "all pods are as they are to be")

    def wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert not self._fault, self._fault
            assert time.monotonic() < deadline, f"waited {timeout_s} s until {what}\n{self.everything()}"
            time.sleep(_TICK_S / 2)

    def named(self, beginning: str) -> list[Pod]:
        """Pods that are not being deleted, the oldest first."""
        with self._lock:
            return [pod for name, pod in self.pods.items() if name.startswith(beginning) and not pod.is_deleting]

    def address_of(self, service: str) -> str:
        return self._addresses[service]

    def from_node(self, work: Callable[[Any], Any], argument: Any) -> Any:
        """What a function returns when the node itself calls it, as kubelet's probes are made."""
        with ThreadPoolExecutor(1, initializer=enter, initargs=(self.network.node,)) as thread:
            return thread.submit(work, argument).result()

    def run_pod(self, template: Object, name: str, timeout_s: float) -> Pod:
        """A pod that ends by itself, such as that of `helm test` or of a Job, with its hook's ConfigMaps among the objects."""
        pod = self._create(name, "", template)
        self.wait(lambda: pod.phase in ("Succeeded", "Failed"), timeout_s, f"{name} has ended")
        with self._lock:
            del self.pods[name]
        return pod

    def add(self, objects: Iterable[Object]) -> None:
        """ConfigMaps and policies of a hook."""
        with self._lock:
            self._objects |= {(each["kind"], each["metadata"]["name"]): each for each in objects}

    def drain(self, node: str, timeout_s: float) -> None:
        """As `kubectl drain`: no new pod comes there, and those that are there are evicted as their budgets allow."""
        with self._lock:
            self._cordoned.add(node)

        def is_empty() -> bool:
            with self._lock:
                left = [pod for pod in self.pods.values() if pod.node == node]
                for pod in left:
                    if not pod.is_deleting and self._may_be_evicted(pod):
                        pod.end()
                return not left

        self.wait(is_empty, timeout_s, f"{node} is empty")

    def uncordon(self, node: str) -> None:
        with self._lock:
            self._cordoned.discard(node)

    def everything(self) -> str:
        """All states, then the ends of all logs (a long report may be cut)."""
        with self._lock:
            pods = [*self.pods.values(), *self.gone]
        states = [
            f"{pod.name} on {pod.node} {pod.address} {pod.phase} ready={pod.is_ready} deleting={pod.is_deleting} "
            f"restarts={pod.restarts} codes={pod.exit_codes}"
            for pod in pods
        ]
        return "\n".join([*states, *(f"== {pod.name}\n{pod.said()[-3000:]}" for pod in pods)])

    def remove_claims(self) -> None:
        """What persistentVolumeClaimRetentionPolicy does at the end of their StatefulSet, and how `helm uninstall` leaves no disk."""
        shutil.rmtree(self._disk / "claims", ignore_errors=True)

    def close(self) -> None:
        self._closing.set()
        self._thread.join(30)
        with self._lock:
            left = list(self.pods.values())
        for pod in left:
            pod.crash()
            pod.end()
        for pod in left:
            pod.thread.join(20)
        self.network.close()
        for folder in (self._disk, self._memory):
            shutil.rmtree(folder, ignore_errors=True)

    def _is_settled(self) -> bool:
        with self._lock:
            for (kind, name), each in self._objects.items():
                if kind in _WORKLOADS:
                    own = [pod for pod in self.pods.values() if pod.owner == name]
                    if len(own) != each["spec"].get("replicas", 1):
                        return False
                    if any(
                        pod.is_deleting or not pod.is_ready or pod.hash != template_hash(_template(each)) for pod in own
                    ):
                        return False
            owners = {name for kind, name in self._objects if kind in _WORKLOADS}
            return all(pod.owner in owners for pod in self.pods.values())

    def _reconcile(self) -> None:
        while not self._closing.wait(_TICK_S):
            try:
                with self._lock:
                    self._step()
            except Exception as error:
                self._fault = f"the controllers failed: {type(error).__name__}: {error}"
                return

    def _step(self) -> None:
        for name, pod in list(self.pods.items()):
            if pod.phase == "Gone":
                del self.pods[name]
                self.gone.append(pod)
        workloads = {name: each for (kind, name), each in self._objects.items() if kind in _WORKLOADS}
        for pod in self.pods.values():
            if pod.owner and pod.owner not in workloads and not pod.is_deleting:
                pod.end()
        for name, each in workloads.items():
            self._step_workload(name, each)
        self._step_network()

    def _step_workload(self, name: str, each: Object) -> None:
        template, replicas = _template(each), each["spec"].get("replicas", 1)
        own = [pod for pod in self.pods.values() if pod.owner == name]
        states = [_state(pod) for pod in own if not pod.is_deleting]
        wanted = template_hash(template)
        if each["kind"] == "Deployment":
            making, going = deployment_step(states, wanted, replicas, each["spec"]["strategy"]["rollingUpdate"])
            names = [f"{name}-{wanted}-{secrets.token_hex(3)}" for _ in range(making)]
        else:
            names, going = stateful_step(states, {pod.name for pod in own}, name, wanted, replicas)
        for gone in going:
            self.pods[gone].end()
        for new in names:
            self._create(new, name, template)

    def _create(self, name: str, owner: str, template: Object) -> Pod:
        with self._lock:
            open_nodes = [node for node in NODES if node not in self._cordoned]
            others = [pod for pod in self.pods.values() if not pod.is_deleting]

            def load(node: str) -> tuple[int, int]:
                """Pods of one owner are spread, then all."""
                there = [pod for pod in others if pod.node == node]
                return sum(pod.owner == owner for pod in there), len(there)

            data = {
                key: each.get("data", {}) for key, each in self._objects.items() if key[0] in ("ConfigMap", "Secret")
            }
            folders = (self._disk, self._memory, self._disk / "claims")
            node = min(open_nodes, key=load)
            pod = Pod(name, owner, node, template, data, self._image, self.network, folders, self._hosts)
            self.pods[name] = pod
            return pod

    def _step_network(self) -> None:
        services = {name: each["spec"] for (kind, name), each in self._objects.items() if kind == "Service"}
        policies = [each["spec"] for (kind, _), each in self._objects.items() if kind == "NetworkPolicy"]
        endpoints = [pod.endpoint() for pod in self.pods.values()]
        rules = ruleset(((spec, self._addresses[name]) for name, spec in services.items()), policies, endpoints)
        if rules != self._rules:
            self.network.firewall(rules)
            self._hosts.write_text(self._names(services, endpoints))
            self._rules = rules

    def _names(self, services: dict[str, Object], endpoints: list[Endpoint]) -> str:
        """What DNS would answer: the address of a Service, or those of the ready pods of a headless one."""
        lines = ["127.0.0.1 localhost"]
        for name, spec in services.items():
            names = [
                name,
                f"{name}.{self._namespace}",
                f"{name}.{self._namespace}.svc",
                f"{name}.{self._namespace}.svc.cluster.local",
            ]
            if spec.get("clusterIP") != "None":
                lines.append(f"{self._addresses[name]} {' '.join(names)}")
                continue
            ready = [pod for pod in endpoints if pod.is_ready and spec["selector"].items() <= pod.labels.items()]
            lines += [f"{pod.address} {' '.join([*names, *(f'{pod.name}.{each}' for each in names)])}" for pod in ready]
        return "\n".join(lines) + "\n"

    def _may_be_evicted(self, pod: Pod) -> bool:
        budgets = [each["spec"] for (kind, _), each in self._objects.items() if kind == "PodDisruptionBudget"]
        everybody = [(_state(each), each.labels) for each in self.pods.values() if not each.is_deleting]
        owner = next(each for (kind, name), each in self._objects.items() if kind in _WORKLOADS and name == pod.owner)
        return may_be_evicted(_state(pod), pod.labels, budgets, everybody, owner["spec"].get("replicas", 1))


def hooks(each: Object) -> set[str]:
    """When Helm makes this object; empty: at install and upgrade."""
    named = each["metadata"].get("annotations", {}).get("helm.sh/hook", "")
    return {name for name in named.split(",") if name}


def _template(workload: Object) -> Object:
    """With the claims that a StatefulSet makes for each of its pods."""
    template: Object = workload["spec"]["template"]
    claims = workload["spec"].get("volumeClaimTemplates", [])
    return {**template, "spec": {**template["spec"], "claims": claims}} if claims else template


def _state(pod: Pod) -> PodState:
    return PodState(pod.name, pod.hash, pod.is_ready)
