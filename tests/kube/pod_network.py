"""The network of a pod runner: a namespace for the node, one for each pod, a pair of virtual cables between them, and nothing that leads outside.

The node routes between pods, as with most network plugins, so that its firewall (pod_firewall.py) sees every packet.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from kube_tools import NotToBeHad, nft

GATEWAY = "169.254.1.1"
_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000


def why_not() -> str:
    """What this machine lacks for pods; empty where they run."""
    programs = ("ip", "unshare", "nsenter", "setpriv", "mount", "chroot")
    missing = [program for program in programs if shutil.which(program) is None]
    if os.geteuid() != 0 or missing:
        return f"pods need root, and {', '.join(missing or programs)}"
    try:
        nft()
    except NotToBeHad as error:
        return f"pods need nft: {error}"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"this machine makes no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def enter(namespace: str) -> None:
    """This thread's sockets, and processes that it starts, belong to the namespace from now on."""
    with open(f"/run/netns/{namespace}") as file:
        if _LIBC.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"namespace {namespace} cannot be entered")


class PodNetwork:
    """Addresses 10.1.0.0/16 are pods', 10.96.0.0/16 are Services'; both mean nothing outside of the node's namespace."""

    def __init__(self) -> None:
        self.node = f"bp{secrets.token_hex(3)}"
        self._count = 0
        self._lock = threading.Lock()
        self._all: set[str] = set()
        _run("ip", "netns", "add", self.node)
        self._all.add(self.node)
        _run("ip", "-n", self.node, "link", "set", "lo", "up")
        _run("ip", "netns", "exec", self.node, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def attach(self) -> tuple[str, str]:
        """A new namespace on the network; returns its name and address."""
        with self._lock:
            self._count += 1
            number = self._count
            name = f"{self.node}-{number}"
            self._all.add(name)
        address = f"10.1.{number // 250}.{number % 250 + 1}"
        _run("ip", "netns", "add", name)
        self._batch(
            self.node,
            f"link add v{number} type veth peer name eth0 netns {name}",
            f"addr add {GATEWAY}/32 dev v{number}",
            f"link set v{number} up",
            f"route add {address}/32 dev v{number}",
        )
        self._batch(
            name,
            "link set lo up",
            f"addr add {address}/32 dev eth0",
            "link set eth0 up",
            f"route add {GATEWAY} dev eth0 scope link",
            f"route add default via {GATEWAY} dev eth0",
        )
        return name, address

    def detach(self, name: str) -> None:
        with self._lock:
            self._all.discard(name)
        _run("ip", "netns", "del", name)

    def firewall(self, rules: str) -> None:
        """Puts a ruleset of nft in the place of the one before, at once."""
        _run("ip", "netns", "exec", self.node, *nft(), "-f", "-", text=rules)

    def thread(self, work: Callable[[], None], name: str) -> threading.Thread:
        """Runs `work` as the node's own: it reaches every pod."""

        def inside() -> None:
            enter(self.node)
            work()

        started = threading.Thread(target=inside, name=name, daemon=True)
        started.start()
        return started

    def clients(self, threads: int) -> ThreadPoolExecutor:
        """Threads of somebody on the network who is no pod."""
        name, _ = self.attach()
        return ThreadPoolExecutor(threads, initializer=enter, initargs=(name,))

    def close(self) -> None:
        for name in sorted(self._all, reverse=True):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        self._all.clear()

    def _batch(self, namespace: str, *lines: str) -> None:
        _run("ip", "-n", namespace, "-batch", "-", text="\n".join(lines) + "\n")


def _run(*command: str, text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{text}{done.stderr}"
