"""Services and NetworkPolicies of a pod runner as a ruleset of nft: what kube-proxy and a network plugin would make of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]


@dataclass(frozen=True)
class Endpoint:
    """A pod as others see it."""

    name: str
    address: str
    labels: dict[str, str]
    ports: dict[str, int]
    is_ready: bool


def chosen(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a selector of labels takes them. An empty one takes all."""
    assert set(selector) <= {"matchLabels"}, f"the pod runner knows matchLabels only: {selector}"
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def ruleset(services: Iterable[tuple[Object, str]], policies: Iterable[Object], pods: list[Endpoint]) -> str:
    """`services` come with their addresses, `policies` as specs. What is established goes on whatever changes."""
    nat = [line for spec, address in services for line in _service(spec, address, pods)]
    policies = list(policies)
    jumps, chains = [], []
    for pod in pods:
        own = [policy for policy in policies if chosen(policy["podSelector"], pod.labels)]
        for way, field in (("Ingress", "daddr"), ("Egress", "saddr")):
            limiting = [policy for policy in own if way in policy["policyTypes"]]
            if not limiting:
                continue
            chain = f"{way.lower()}_{pod.address.replace('.', '_')}"
            jumps.append(f"ip {field} {pod.address} jump {chain}")
            rules = [rule for policy in limiting for rule in policy.get(way.lower(), [])]
            allowed = [line for rule in rules for line in _allowed(rule, way, pod, pods)]
            chains.append(f"chain {chain} {{\n" + "\n".join([*dict.fromkeys(allowed), "reject"]) + "\n}")
    return "\n".join(
        [
            "add table ip pods",
            "delete table ip pods",
            "table ip pods {",
            *chains,
            "chain services {\ntype nat hook prerouting priority dstnat;",
            *nat,
            "}",
            "chain nobody {\ntype filter hook prerouting priority -90;",
            "ip daddr 10.96.0.0/16 reject with icmp type port-unreachable",
            "}",
            "chain forward {\ntype filter hook forward priority filter; policy accept;",
            "ct state established,related accept",
            *jumps,
            "}",
            "}\n",
        ]
    )


def _service(spec: Object, address: str, pods: list[Endpoint]) -> list[str]:
    """Each new connection goes to one of the ready pods; to nobody (and is refused) where there is none."""
    ready = sorted(
        (pod for pod in pods if pod.is_ready and spec["selector"].items() <= pod.labels.items()),
        key=lambda pod: pod.address,
    )
    lines = []
    for port in spec["ports"]:
        target = port.get("targetPort", port["port"])
        for at, pod in enumerate(ready):
            own = pod.ports[target] if isinstance(target, str) else target
            share = f"numgen random mod {len(ready) - at} 0 " if at + 1 < len(ready) else ""
            lines.append(f"ip daddr {address} tcp dport {port['port']} {share}dnat to {pod.address}:{own}")
    return lines


def _allowed(rule: Object, way: str, pod: Endpoint, pods: list[Endpoint]) -> list[str]:
    """Lines that let one rule's connections through; all of them where it names neither others nor ports."""
    field, side = ("saddr", "from") if way == "Ingress" else ("daddr", "to")
    lines = []
    for others in _others(rule.get(side), pods):
        who = f"ip {field} {{ {', '.join(others)} }} " if others is not None else ""
        if others is not None and not others:
            continue
        for port in rule.get("ports", [None]):
            if port is None:
                lines.append(f"{who}return")
                continue
            number = port["port"]
            if isinstance(number, str):
                assert way == "Ingress", "the pod runner knows names of ports for Ingress only"
                number = pod.ports[number]
            lines.append(f"{who}{port.get('protocol', 'TCP').lower()} dport {number} return")
    return lines


def _others(peers: list[Object] | None, pods: list[Endpoint]) -> list[list[str] | None]:
    """Addresses of each peer; None: everybody."""
    if peers is None:
        return [None]
    found: list[list[str] | None] = []
    for peer in peers:
        assert set(peer) in ({"podSelector"}, {"ipBlock"}), f"the pod runner does not know {peer}"
        if "ipBlock" in peer:
            found.append([peer["ipBlock"]["cidr"]])
        else:
            found.append([pod.address for pod in pods if chosen(peer["podSelector"], pod.labels)])
    return found
