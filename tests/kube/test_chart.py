"""The Helm chart, checked by programs: both Helms, Kubernetes' schemas, Pod Security, and Baton's own readers of flags and settings.

No node of Kubernetes runs here: see docs/kubernetes.md for what that leaves open. `BATON_GOLDEN=write` writes the golden renders.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from chart_render import CASES, CHART, KUBERNETES, Object, component, containers, pods, refusal, render, run_helm
from kube_tools import NotToBeHad, crd_models, linter

from cluster.cli import make_parser
from cluster.commands.flags import config_from
from cluster.identity.folder import issue, members
from cluster.ray_session.node import END_S
from cluster.tenants.file import read_tenants
from router.tenants.config import TenantLimits

GOLDEN = Path(__file__).parent / "golden"
CUSTOM = {
    "RayCluster",
    "LeaderWorkerSet",
    "ServiceMonitor",
    "PodMonitor",
    "PrometheusRule",
    "ScaledObject",
    "HTTPRoute",
    "Certificate",
    "Issuer",
}


@cache
def rendered(case: str) -> list[Object]:
    """Once for all tests, and not before the first: Helm may have to be installed."""
    return render(case)


def normal(objects: list[Object]) -> str:
    """As text that is the same each time: made-up secrets and what is a file of its own are left out."""
    kept = []
    for each in objects:
        if each["kind"] == "Secret":
            each = {**each, "data": dict.fromkeys(each["data"], "made at install")}
        if "-dashboard-" in each["metadata"]["name"] or each["kind"] == "PrometheusRule":
            each = {**each, "data": "a file of the chart", "spec": "a file of the chart"}
        kept.append(each)
    kept.sort(key=lambda each: (each["kind"], each["metadata"]["name"]))
    return yaml.safe_dump_all(kept, sort_keys=True, width=160)


@pytest.mark.parametrize("case", CASES)
def test_both_helms_render_what_was_looked_at(case: str) -> None:
    text = normal(rendered(case))
    assert text == normal(render(case, 3))
    path = GOLDEN / f"{case}.yaml"
    if os.environ.get("BATON_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs: look at it, then write it anew with BATON_GOLDEN=write"


@pytest.mark.parametrize("case", CASES)
def test_kubernetes_schemas_take_every_object(case: str) -> None:
    """Templates of pods in objects of others' kinds are looked at as those of a Deployment."""
    versions = [kubernetes_validate.latest_version()]
    if case != "openshift-like":  # image volumes are newer
        versions.append("1.29")
    objects = [each for each in rendered(case) if each["kind"] not in CUSTOM]
    for name, template in pods([each for each in rendered(case) if each["kind"] in CUSTOM]):
        spec = {"selector": {"matchLabels": template["metadata"]["labels"]}, "template": template}
        objects.append({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec})
    for version in versions:
        for each in objects:
            kubernetes_validate.validate(each, version, strict=True)


def test_schemas_of_crds_take_every_object_of_theirs() -> None:
    """Types and what is required; what no schema knows passes. RayCluster and LeaderWorkerSet have no such package."""
    try:
        models = crd_models()
    except NotToBeHad as error:
        pytest.skip(str(error))
    issued = render("300b-ep16-multinode", 4, "--set", "tls.issuerRef=null")
    objects = [each for case in CASES for each in rendered(case)] + issued
    own = [each for each in objects if each["kind"] in CUSTOM - {"RayCluster", "LeaderWorkerSet"}]
    wrong = {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": "x"},
        "spec": {"triggers": 1},
    }
    command = ["node", str(Path(__file__).with_name("crd_check.mjs"))]
    done = subprocess.run(
        command, input=json.dumps([*own, wrong]), cwd=models, capture_output=True, text=True, check=True
    )
    faults = [line for line in done.stdout.splitlines() if line.startswith("fault")]
    assert len(faults) == 1 and faults[0].startswith("fault ScaledObject x:"), faults
    compared = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("compared")}
    assert compared == {each["kind"] for each in own}


WORKERS = {"Deployment/baton-prefill", "Deployment/baton-decode"}
ROUTER, HEAD = {"Deployment/baton-router"}, {"StatefulSet/baton-ray"}


@pytest.mark.parametrize(
    ("setting", "changed"),
    [
        ("image.tag=next", WORKERS | ROUTER | HEAD | {"Pod/baton-test"}),
        ("config.start_timeout_s=700", WORKERS | ROUTER | HEAD),
        ("model.servedName=tiny", WORKERS),
        ("pools.decode.drainSeconds=90", {"Deployment/baton-decode"}),
        ("tenants.settings.acme.weight=2", ROUTER),
        ("config.roles.mode=off", ROUTER),
        ("routers.router.policy=round_robin", ROUTER),
    ],
)
def test_an_upgrade_starts_only_those_pods_again_that_read_what_has_changed(setting: str, changed: set[str]) -> None:
    """What it takes to know a pod by is its template."""
    before, after = (
        dict(pods(objects)) for objects in (rendered("cpu-tryout"), render("cpu-tryout", 4, "--set", setting))
    )
    assert {name for name, template in before.items() if after[name] != template} == changed


@pytest.mark.parametrize("case", CASES)
def test_helm_lint_finds_nothing(case: str) -> None:
    done = run_helm(4, "lint", "--strict", str(CHART), "-f", str(CHART / "ci" / f"{case}.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


MEANT = {"KBP003": set(CASES)} | {
    "PSS105": {"300b-ep16-multinode"},
    "PSS201": {"300b-ep16-multinode", "openshift-like"},
    "KBP104": {"openshift-like"},
    "KBP105": {"openshift-like"},
}
"""What a linter finds, by rule, and in which files of ci/: no limit of processors, which would stall tokens; a folder of the nodes that a case asks for; images as volumes,
which the linter does not know; users that OpenShift assigns."""


def test_a_linter_finds_what_is_meant_and_nothing_else() -> None:
    """All rules of @monokle/validation of common practice (those of kube-linter), Pod Security and what objects refer to."""
    try:
        folder = linter()
    except NotToBeHad as error:
        pytest.skip(str(error))
    bad = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "bad"},
        "spec": {"containers": [{"name": "c", "image": "x"}]},
    }
    groups = {**{case: rendered(case) for case in CASES}, "bad": [bad]}
    command = ["node", str(Path(__file__).with_name("lint.mjs"))]
    done = subprocess.run(command, input=json.dumps(groups), cwd=folder, capture_output=True, text=True, check=True)
    found: dict[str, set[str]] = {}
    for group, rule, where in json.loads(done.stdout):
        found.setdefault(rule if group in CASES else group, set()).add(group if group in CASES else rule)
        assert where
    assert found.pop("bad") >= {"KBP003", "KBP004", "KBP102", "KBP106", "PSS203", "PSS205"}, "the linter looks"
    assert found == MEANT


@pytest.mark.parametrize("case", CASES)
def test_pods_are_restricted(case: str) -> None:
    """Pod Security's level "restricted", but for what a case asks for by name."""
    asked = {"hostNetwork", "hostPath"} if case == "300b-ep16-multinode" else set()
    found = {
        (name, fault)
        for name, template in pods(rendered(case))
        for fault in faults(template, user_is_given=case != "openshift-like")
        if fault not in asked
    }
    assert not found


def faults(template: Object, user_is_given: bool) -> list[str]:
    spec = template["spec"]
    known = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    found = [kind for volume in spec.get("volumes", []) for kind in volume if kind not in known | {"name"}]
    found += [field for field in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace") if spec.get(field)]
    pod = spec.get("securityContext", {})
    if pod.get("runAsNonRoot") is not True or pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
        found.append("may be root, or without seccomp")
    if user_is_given and not pod.get("runAsUser"):
        found.append("no user")
    if spec.get("automountServiceAccountToken") is not False:
        found.append("has a token of Kubernetes")
    for each in containers(template):
        own = each.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
            found.append(f"{each['name']} has privileges")
        if own.get("readOnlyRootFilesystem") is not True:
            found.append(f"{each['name']} writes to its root")
        if any("hostPort" in port for port in each.get("ports", [])):
            found.append("hostPort")
        if (
            not {"cpu", "memory"} <= set(each["resources"].get("requests", {}))
            or "memory" not in each["resources"]["limits"]
        ):
            found.append(f"{each['name']} asks for no resources")
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_pods_refer_to_is_there(case: str) -> None:
    objects = rendered(case)
    held: dict[tuple[str, str], set[str]] = {
        (each["kind"], each["metadata"]["name"]): set(each.get("data", {}))
        for each in objects
        if each["kind"] in ("Secret", "ConfigMap")
    }
    given = {"baton-redis", "baton-redis-tls", "baton-own-secrets", "baton-own-authority", "baton-api-keys"}
    given |= {"baton-own-tenants"}
    given |= {"baton-authority"} if case == "300b-ep16-multinode" else set()  # cert-manager's
    for name, template in pods(objects):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounted = {mount["name"] for each in containers(template) for mount in each["volumeMounts"]}
        claims = {"data"} if component(template) == "redis" else set()
        assert mounted == set(volumes) | (mounted & claims), name
        for volume in volumes.values():
            for kind, field, key in (("Secret", "secret", "secretName"), ("ConfigMap", "configMap", "name")):
                if field in volume and (own := volume[field][key]) not in given:
                    wanted = {item["key"] for item in volume[field].get("items", [])}
                    assert wanted <= held[kind, own], (name, own)
        # The authority's key is for the init container alone.
        for each in template["spec"]["containers"]:
            assert "authority" not in {mount["name"] for mount in each["volumeMounts"]}, name


@pytest.mark.parametrize("case", CASES)
def test_every_pod_has_a_network_policy_and_every_service_has_pods(case: str) -> None:
    objects = rendered(case)
    labels = {name: template["metadata"]["labels"] for name, template in pods(objects)}

    def chosen(selector: Object) -> set[str]:
        return {name for name, own in labels.items() if selector.items() <= own.items()}

    policies = [each["spec"] for each in objects if each["kind"] == "NetworkPolicy"]
    covered = set().union(*(chosen(policy["podSelector"]["matchLabels"]) for policy in policies))
    assert set(labels) == covered
    assert all(policy["policyTypes"] == ["Ingress", "Egress"] for policy in policies)
    # From outside of the release only routers are reached.
    open_to_all = {
        policy["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        for policy in policies
        if any("from" not in rule for rule in policy["ingress"])
    }
    assert open_to_all <= {"router"}
    for each in objects:
        if each["kind"] == "Service":
            names = chosen(each["spec"]["selector"])
            assert names, each["metadata"]["name"]
            for name, template in pods(objects):
                ports = {port["name"] for container in containers(template) for port in container.get("ports", [])}
                assert name not in names or {port["targetPort"] for port in each["spec"]["ports"]} <= ports
        if each["kind"] == "PodDisruptionBudget" and case != "raycluster":
            assert len(chosen(each["spec"]["selector"]["matchLabels"])) == 1


@pytest.mark.parametrize("case", CASES)
def test_baton_takes_the_arguments_and_settings_of_every_container(case: str, tmp_path: Path) -> None:
    """With the parser and the readers that run in the container; files of Secrets are stand-ins."""
    objects = rendered(case)
    settings = {each["metadata"]["name"]: each["data"] for each in objects if each["kind"] == "ConfigMap"}
    (tmp_path / "keys").write_text("a-key\n")
    seen = set()
    for name, template in pods(objects):
        configs = [v["configMap"]["name"] for v in template["spec"]["volumes"] if "configMap" in v]
        for each in containers(template):
            if "command" in each:
                continue
            arguments = [
                str(part).replace("$(POD_NAME)", "baton-x-1").replace("$(POD_IP)", "10.0.0.9") for part in each["args"]
            ]
            if configs:
                for file, text in settings[configs[0]].items():
                    (tmp_path / file).write_text(text)
            arguments = [part.replace("/etc/baton", str(tmp_path)) for part in arguments]
            arguments = [
                f"{part.partition('=')[0]}={tmp_path}/keys" if "-key-file=" in part else part for part in arguments
            ]
            args = make_parser().parse_args(arguments)
            seen.add(arguments[0])
            if not configs or not hasattr(
                args, "assignments"
            ):  # init containers with files of their own, and the test's pod, which talks to a router only
                continue
            config = config_from(args, {})
            assert config.store.cluster == "serving.baton"
            assert config.tls.has_files == (arguments[0] in ("router", "worker")), name
            if arguments[0] == "router":
                grace = template["spec"]["terminationGracePeriodSeconds"]
                (sleep,) = (
                    int(c["lifecycle"]["preStop"]["exec"]["command"][1]) for c in template["spec"]["containers"]
                )
                assert grace > sleep + config.router.shutdown_timeout_s + 5
            if arguments[0] == "worker":
                grace = template["spec"]["terminationGracePeriodSeconds"]
                assert grace > config.worker.drain_timeout_s + config.stop_timeout_s + 20 + END_S
                assert config.ray.address in args.ray_address
    assert {"router", "worker", "ray", "tls", "doctor"} <= seen


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["mode=ray"], "at '/mode': value must be one of 'plain', 'raycluster'"),
        (["pools.decode.role=both"], "value must be one of 'prefill', 'decode', 'mixed'"),
        (["poolDefaults.gpus=8"], "additional properties 'gpus' not allowed"),
        (["pools.prefill.replicas=0"], "no pool could prefill: give pools.prefill or pools.mixed a replica"),
        (["pools.decode.replicas=0"], "no pool could decode"),
        (["model.source=pvc"], "name the claim that holds the checkpoint in model.pvc.claimName"),
        (["model.source=download"], "name what to download in model.download.repository"),
        (["redis.enabled=false"], "name your Redis in redis.external.host"),
        (["tls.source=existing"], "name the Secret with the authority in tls.existingSecret"),
        (["ingress.enabled=true"], "ingress.enabled needs ingress.host"),
        (["tenants.existingSecret=a", "tenants.settings.b.weight=2"], "leave tenants.settings empty"),
        (["tenants.existingSecret=a", "auth.insecure=true"], "tenants are told apart by their keys"),
        (["tenants.settings.b=2"], "at '/tenants/settings/b'"),
        (["pools.decode.hostNetwork=true"], "give the nodes' addresses in networkPolicy.nodes"),
        (["monitoring.podMonitor=true"], "monitoring.podMonitor: name who may scrape in networkPolicy.monitors"),
        (["mode=raycluster", "poolDefaults.podsPerWorker=2"], "mode raycluster has workers of one pod only"),
        (["poolDefaults.strategy.maxSurge=0"], "lets no pod go and none come"),
        (["pools.averylongpoolname.role=mixed", "pools.averylongpoolname.replicas=1"], "averylongpoolname"),
        (["routers.autoscaling.enabled=true", "routers.autoscaling.minReplicas=9"], "minReplicas is above maxReplicas"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_with_a_sentence(settings: list[str], sentence: str) -> None:
    assert sentence in refusal(*settings)


def test_an_old_kubernetes_is_refused() -> None:
    done = run_helm(4, "template", "baton", str(CHART), "--kube-version", "1.28.0")
    assert done.returncode != 0 and "1.29" in done.stderr
    values = ["--set", "model.source=imageVolume", "--set", "model.imageVolume.reference=x"]
    done = run_helm(4, "template", "baton", str(CHART), "--kube-version", "1.29.0", *values)
    assert "model.source imageVolume needs Kubernetes 1.33" in done.stderr
    assert KUBERNETES > "1.33"


def test_the_file_of_tenants_is_read_where_the_routers_look_for_it(tmp_path: Path) -> None:
    """From values that Helm has read: numbers, times and empty settings are still what they were."""
    for case in ("21b-h200-2p6d", "external-redis-tls"):
        objects = rendered(case)
        ((_, template),) = [each for each in pods(objects) if each[0] == "Deployment/baton-router"]
        (volume,) = [volume for volume in template["spec"]["volumes"] if volume["name"] == "tenants"]
        (mount,) = [m for m in template["spec"]["containers"][0]["volumeMounts"] if m["name"] == "tenants"]
        (config,) = [each["data"] for each in objects if each["metadata"]["name"] == "baton" and "data" in each]
        asked = yaml.safe_load(config["router.yaml"])["router"]["tenants"]["file"]
        assert asked == f"{mount['mountPath']}/{volume['secret']['items'][0]['path']}"
        assert "tenants" not in {v["name"] for n, t in pods(objects) if "router" not in n for v in t["spec"]["volumes"]}
    (secret,) = [each for each in rendered("21b-h200-2p6d") if each["metadata"]["name"] == "baton-tenants"]
    (tmp_path / "tenants.yaml").write_bytes(base64.b64decode(secret["data"]["tenants.yaml"]))
    read = read_tenants(tmp_path / "tenants.yaml", 10)
    assert read.tenants == {
        "acme": TenantLimits(weight=2, input_tokens_per_min=2_000_000),
        "trial": TenantLimits(requests_per_min=20),
    }
    assert [(key.tenant, key.expires_s) for key in read.keys] == [("acme", 1_814_313_600.0)]


def test_the_authority_that_helm_makes_signs_for_baton(tmp_path: Path) -> None:
    """Another library has made its key and its identifier; a handshake tells whether ours fits."""
    (secret,) = [e for e in rendered("cpu-tryout") if e["metadata"]["name"] == "baton-authority"]
    for name, text in secret["data"].items():
        (tmp_path / name).write_bytes(base64.b64decode(text))
    issue(tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "own", members(["w-1"], ["r-1"]), 1)
    contexts = {}
    for side, protocol in (("router.r-1", ssl.PROTOCOL_TLS_CLIENT), ("worker.w-1", ssl.PROTOCOL_TLS_SERVER)):
        context = contexts[side] = ssl.SSLContext(protocol)
        context.load_cert_chain(tmp_path / "own" / f"{side}.crt", tmp_path / "own" / f"{side}.key")
        context.load_verify_locations(tmp_path / "own" / "ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = contexts["router.r-1"].wrap_bio(to_client, to_server, server_hostname="w-1.worker.baton")
    server = contexts["worker.w-1"].wrap_bio(to_server, to_client, server_side=True)
    done: set[Any] = set()
    for _ in range(10):
        for end in (client, server):
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                continue
    assert done == {client, server}


def test_secrets_are_made_anew_only_at_install() -> None:
    """Two renders differ in their secrets, so that none is fixed in the chart; what is given is not made."""
    first, second = (
        next(e for e in objects if e["metadata"]["name"] == "baton-secrets")
        for objects in (rendered("cpu-tryout"), render())
    )
    assert set(first["data"]) == {"store-secret", "ray-token", "redis-password"}
    assert all(first["data"][name] != second["data"][name] for name in first["data"])
    text = (CHART / "templates" / "secrets.yaml").read_text()
    assert text.count("lookup") >= 3
    assert not [e for e in rendered("external-redis-tls") if e["kind"] == "Secret"]
