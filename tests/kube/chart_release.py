"""A release as Helm would keep it: each revision's objects, with the secrets that an upgrade finds there.

The chart looks up what exists when it is rendered. `LookupServer` answers just that, as an API server would, so that upgrades and rollbacks
are rendered by Helm itself; the objects go to a pod runner, not to a server.
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from chart_render import CHART, KUBERNETES, Object, run_helm

NAMESPACE = "serving"


KINDS = {
    "v1": ("ConfigMap", "Pod", "Secret", "Service", "ServiceAccount"),
    "apps/v1": ("Deployment", "StatefulSet"),
    "batch/v1": ("Job",),
    "networking.k8s.io/v1": ("NetworkPolicy",),
    "policy/v1": ("PodDisruptionBudget",),
}
"""What Helm asks for before it looks anything up."""


class LookupServer:
    """Serves one namespace's Secrets, for `lookup` in templates; nothing can be changed through it."""

    def __init__(self) -> None:
        self.secrets: dict[str, Object] = {}
        secrets = self.secrets

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, _, _ = self.path.partition("?")
                group = path.removeprefix("/api/").removeprefix("/apis/")
                name = path.removeprefix(f"/api/v1/namespaces/{NAMESPACE}/secrets/")
                if path == "/version":
                    self._answer(200, {"major": "1", "minor": "35", "gitVersion": f"v{KUBERNETES}"})
                elif path == "/api":
                    self._answer(200, {"kind": "APIVersions", "versions": ["v1"]})
                elif path == "/apis":
                    self._answer(200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": _groups()})
                elif group in KINDS:
                    self._answer(
                        200, {"kind": "APIResourceList", "groupVersion": group, "resources": _resources(group)}
                    )
                elif name in secrets:
                    self._answer(200, secrets[name])
                else:
                    self._answer(
                        404,
                        {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404},
                    )

            def _answer(self, status: int, body: Object) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._folder = tempfile.TemporaryDirectory()
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{self._server.server_address[1]}"}}
        config = {"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "current-context": "c"}
        config |= {
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {}}],
        }
        self.kubeconfig = str(Path(self._folder.name) / "config")
        Path(self.kubeconfig).write_text(json.dumps(config))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()


def _groups() -> list[Object]:
    found = []
    for group in sorted(set(KINDS) - {"v1"}):
        version = {"groupVersion": group, "version": "v1"}
        found.append({"name": group.removesuffix("/v1"), "versions": [version], "preferredVersion": version})
    return found


def _resources(group: str) -> list[Object]:
    names = ((kind, re.sub(r"y$", "ie", kind.lower()) + "s") for kind in KINDS[group])
    return [{"name": name, "kind": kind, "namespaced": True, "verbs": ["get"]} for kind, name in names]


class Release:
    """Renders with a file of values in ci/ and what `settings` lay over it."""

    def __init__(self, case: str, major: int, *settings: str) -> None:
        self._case, self._major, self._settings = case, major, settings
        self._server = LookupServer()
        self.revisions: list[list[Object]] = []

    def render(self, *settings: str) -> list[Object]:
        """All objects, hooks as well; Secrets that an earlier revision has are found there."""
        sets = [part for setting in (*self._settings, *settings) for part in ("--set", setting)]
        command = [
            "template",
            "baton",
            str(CHART),
            "-n",
            NAMESPACE,
            "--kube-version",
            KUBERNETES,
            "--dry-run=server",
            "--disable-openapi-validation",
        ]
        command += ["--is-upgrade"] if self.revisions else []
        values = ["-f", str(CHART / "ci" / f"{self._case}.yaml"), *sets]
        done = run_helm(self._major, *command, *values, cluster=self._server.kubeconfig)
        assert done.returncode == 0, done.stderr
        return [each for each in yaml.safe_load_all(done.stdout) if each]

    def upgrade(self, *settings: str) -> list[Object]:
        """A new revision, the first one too."""
        objects = self.render(*settings)
        self.revisions.append(objects)
        self._server.secrets.update({each["metadata"]["name"]: each for each in objects if each["kind"] == "Secret"})
        return objects

    def rollback(self, revision: int) -> list[Object]:
        """As `helm rollback`: the objects of that revision (1 is the first), as a new one."""
        self.revisions.append(self.revisions[revision - 1])
        return self.revisions[-1]

    def close(self) -> None:
        self._server.close()
