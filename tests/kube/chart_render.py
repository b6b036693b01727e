"""The chart as tests see it: rendered by either Helm, as objects of Kubernetes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from kube_tools import helm

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "baton"
CASES = sorted(path.stem for path in (CHART / "ci").glob("*.yaml"))
KUBERNETES = "1.35.0"
"""What the cluster says that it is, where a test does not say otherwise: the two Helms assume different ones."""
Object = dict[str, Any]


def run_helm(major: int, *arguments: str, cluster: str = "/nonexistent") -> subprocess.CompletedProcess[str]:
    """`cluster`: a kubeconfig, where Helm is to find one."""
    environment = {**os.environ, "HELM_CACHE_HOME": "/nonexistent", "KUBECONFIG": cluster}
    return subprocess.run([helm(major), *arguments], capture_output=True, text=True, env=environment, timeout=60)


def render(case: str = "cpu-tryout", major: int = 4, *more: str) -> list[Object]:
    """The objects of a file of values in ci/, as a release named `baton` in the namespace `serving`."""
    values = ("-f", str(CHART / "ci" / f"{case}.yaml"))
    done = run_helm(
        major, "template", "baton", str(CHART), "-n", "serving", "--kube-version", KUBERNETES, *values, *more
    )
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def refusal(*settings: str) -> str:
    """What Helm says to values that it does not take."""
    sets = [part for setting in settings for part in ("--set", setting)]
    done = run_helm(4, "template", "baton", str(CHART), "--kube-version", KUBERNETES, *sets)
    assert done.returncode != 0, f"{settings} are taken"
    return done.stderr


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Name and template of everything that makes pods."""
    for each in objects:
        name, spec = f"{each['kind']}/{each['metadata']['name']}", each.get("spec", {})
        if each["kind"] == "Pod":
            yield name, {"metadata": each["metadata"], "spec": spec}
        elif each["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield name, spec["template"]
        elif each["kind"] == "RayCluster":
            yield f"{name}/head", spec["headGroupSpec"]["template"]
            for group in spec["workerGroupSpecs"]:
                yield f"{name}/{group['groupName']}", group["template"]
        elif each["kind"] == "LeaderWorkerSet":
            yield f"{name}/leader", spec["leaderWorkerTemplate"]["leaderTemplate"]
            yield f"{name}/worker", spec["leaderWorkerTemplate"]["workerTemplate"]


def containers(template: Object) -> list[Object]:
    spec = template["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


def component(template: Object) -> str:
    return str(template["metadata"]["labels"]["app.kubernetes.io/component"])
