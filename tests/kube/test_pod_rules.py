"""What the pod runner decides without any process: rollouts, evictions, rules of the firewall, probes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pod_firewall import Endpoint, ruleset
from pod_probes import Probe
from pod_rollout import PodState, deployment_step, may_be_evicted, stateful_step


def states(**pods: str) -> list[PodState]:
    """`new`, `old`, and a `!` behind for one that is ready."""
    return [PodState(name, state.removesuffix("!"), state.endswith("!")) for name, state in pods.items()]


@pytest.mark.parametrize(
    ("surge", "unavailable", "pods", "making", "going"),
    [
        (1, 0, states(a="old!", b="old!"), 1, []),
        (1, 0, states(a="old!", b="old!", c="new"), 0, []),
        (1, 0, states(a="old!", b="old!", c="new!"), 0, ["b"]),
        (1, 0, states(a="old!", c="new!"), 1, []),
        (0, 1, states(a="old!", b="old!"), 0, ["b"]),
        (0, 1, states(a="old!"), 1, []),
        ("50%", "50%", states(a="old!", b="old!"), 1, ["b"]),
        (1, 0, states(a="old", b="old!"), 1, ["a"]),  # what is not ready serves nobody
        (1, 0, states(a="new!", b="new!", c="new"), 0, ["c"]),
    ],
)
def test_a_deployment_never_has_too_many_nor_too_few_ready(
    surge: int | str, unavailable: int | str, pods: list[PodState], making: int, going: list[str]
) -> None:
    strategy = {"maxSurge": surge, "maxUnavailable": unavailable}
    assert deployment_step(pods, "new", 2, strategy) == (making, going)


def test_a_stateful_set_makes_a_name_again_when_its_pod_is_gone() -> None:
    old, new = PodState("s-0", "old", True), PodState("s-0", "new", True)
    assert stateful_step([], set(), "s", "new", 1) == (["s-0"], [])
    assert stateful_step([old], {"s-0"}, "s", "new", 1) == ([], ["s-0"])
    assert stateful_step([], {"s-0"}, "s", "new", 1) == ([], [])  # it is ending
    assert stateful_step([new], {"s-0"}, "s", "new", 2) == (["s-1"], [])
    assert stateful_step([new, PodState("s-1", "new", True)], {"s-0", "s-1"}, "s", "new", 1) == ([], ["s-1"])


def test_a_budget_lets_one_after_the_other_go() -> None:
    labels = {"pool": "decode"}
    budget = {"selector": {"matchLabels": labels}, "maxUnavailable": 1}
    ready, other, broken = states(a="x!", b="x!", c="x")
    assert may_be_evicted(ready, labels, [budget], [(ready, labels), (other, labels)], 2)
    assert not may_be_evicted(ready, labels, [budget], [(ready, labels), (broken, labels)], 2)
    always = budget | {"unhealthyPodEvictionPolicy": "AlwaysAllow"}
    assert may_be_evicted(broken, labels, [always], [(ready, labels), (broken, labels)], 2)
    assert may_be_evicted(ready, {"pool": "else"}, [budget], [], 1)


def lines(text: str, chain: str) -> Iterator[str]:
    yield from text.partition(f"chain {chain} {{\n")[2].partition("\n}")[0].splitlines()


def test_policies_and_services_become_rules() -> None:
    router = Endpoint("r", "10.1.0.1", {"is": "router"}, {"http": 8000}, True)
    worker = Endpoint("w", "10.1.0.2", {"is": "worker"}, {"probes": 8081}, True)
    late = Endpoint("l", "10.1.0.3", {"is": "router"}, {"http": 8000}, False)
    service = {"selector": {"is": "router"}, "ports": [{"port": 80, "targetPort": "http"}]}
    open_door = {"podSelector": {"matchLabels": {"is": "router"}}, "policyTypes": ["Ingress"]}
    open_door["ingress"] = [{"ports": [{"port": "http", "protocol": "TCP"}]}]
    inner = {"podSelector": {"matchLabels": {"is": "worker"}}, "policyTypes": ["Ingress", "Egress"]}
    inner |= {"ingress": [{"from": [{"podSelector": {"matchLabels": {"is": "router"}}}]}], "egress": []}
    text = ruleset([(service, "10.96.0.1")], [open_door, inner], [router, worker, late])
    assert "ip daddr 10.96.0.1 tcp dport 80 dnat to 10.1.0.1:8000" in list(lines(text, "services"))
    assert list(lines(text, "ingress_10_1_0_1")) == ["tcp dport 8000 return", "reject"]
    assert list(lines(text, "ingress_10_1_0_2")) == ["ip saddr { 10.1.0.1, 10.1.0.3 } return", "reject"]
    assert list(lines(text, "egress_10_1_0_2")) == ["reject"]
    assert "ip saddr 10.1.0.1 jump" not in text, "nothing limits what a router asks for"


def test_a_probe_believes_several_answers_in_a_row() -> None:
    probe = Probe({"periodSeconds": 5, "failureThreshold": 2}, 0.0)
    assert probe.is_due(0.0) and probe.passes is None
    probe.answered(False, 0.0)
    assert probe.passes is None and not probe.is_due(4.0) and probe.is_due(5.0)
    probe.answered(True, 5.0)
    assert probe.passes is True
    probe.answered(False, 10.0)
    assert probe.passes is True
    probe.answered(False, 15.0)
    assert probe.passes is False
