"""Which processors a worker's computing threads run on, and which NUMA nodes its memory comes from; knows no model.

Threads inherit both from the thread that starts them, so one that is pinned passes its place on.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from workers.errors import InvalidConfig
from workers.machine.limits import usable_cpus

logger = logging.getLogger(__name__)
T = TypeVar("T")

_NODES = Path("/sys/devices/system/node")
_CALLS = {"x86_64": (237, 238), "aarch64": (235, 237)}
"""Linux's numbers of mbind and set_mempolicy, for which the C library has no names."""
_PREFERRED, _INTERLEAVED = 1, 3
"""MPOL_PREFERRED and MPOL_INTERLEAVE of linux/mempolicy.h."""


@dataclass(frozen=True, slots=True)
class Processors:
    """Processors and the NUMA nodes that they belong to; without any, threads and memory go where the system puts them."""

    cpus: frozenset[int] = frozenset()
    nodes: frozenset[int] = frozenset()

    @staticmethod
    def of(text: str) -> Processors:
        """Those that worker.cpus names. Raises InvalidConfig when this process may not use them."""
        if not text:
            return Processors()
        nodes = read_nodes()
        cpus = parse(text, nodes)
        allowed = os.sched_getaffinity(os.getpid())
        if not cpus <= allowed:
            raise InvalidConfig(
                f"worker.cpus {text!r} names processors {_list(cpus - allowed)}; this process may use {_list(allowed)}"
            )
        return Processors(cpus, frozenset(node for node, members in nodes.items() if members & cpus))

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns; on a thread that is pinned, so that the caller's own place stays as it is."""
        if not self.cpus:
            return work()
        with ThreadPoolExecutor(1, "pinned", self.pin) as thread:
            return thread.submit(work).result()

    def pin(self) -> None:
        """The calling thread runs on these processors from now on, and what memory it touches first comes from their nodes."""
        if self.cpus:
            os.sched_setaffinity(0, self.cpus)
            self._ask(1, (), ())

    def bind(self, address: int, num_bytes: int) -> None:
        """Memory that has not been touched yet comes from these nodes, whoever touches it first. `address` begins a page."""
        if self.cpus:
            self._ask(0, (ctypes.c_void_p(address), ctypes.c_ulong(num_bytes)), (ctypes.c_uint(0),))

    def _ask(self, call: int, before: tuple[object, ...], after: tuple[object, ...]) -> None:
        """One node is preferred to others; several take turns. Where the system forbids it, memory goes where it is touched."""
        numbers = _CALLS.get(platform.machine())
        if numbers is None or not self.nodes:
            return
        num_words = max(self.nodes) // 64 + 1
        mask = (ctypes.c_ulong * num_words)()
        for node in self.nodes:
            mask[node // 64] |= 1 << node % 64
        mode = ctypes.c_int(_PREFERRED if len(self.nodes) == 1 else _INTERLEAVED)
        system = ctypes.CDLL(None, use_errno=True).syscall
        system.restype = ctypes.c_long
        bits = ctypes.c_ulong(64 * num_words + 1)
        if system(ctypes.c_long(numbers[call]), *before, mode, mask, bits, *after):
            logger.warning("memory is not bound to NUMA nodes: %s", os.strerror(ctypes.get_errno()))


def parse(text: str, nodes: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """Processors of a list such as "0-3,8" or "numa:0", whose members `nodes` gives. Raises InvalidConfig."""
    found: set[int] = set()
    for item in text.split(","):
        name = item.strip()
        if match := re.fullmatch(r"numa:(\d{1,4})", name):
            if int(match[1]) not in nodes:
                raise InvalidConfig(f"worker.cpus names {name}; this host has NUMA nodes {_list(nodes)}")
            found |= nodes[int(match[1])]
        elif (match := re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", name)) and int(match[1]) <= int(match[2] or match[1]):
            found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
        else:
            raise InvalidConfig(
                f'worker.cpus takes numbers, ranges and nodes such as "0-3,8" or "numa:0"; it is {text!r}'
            )
    return frozenset(found)


def read_nodes(root: Path = _NODES) -> dict[int, frozenset[int]]:
    """The processors of each NUMA node; empty where the system does not say."""
    lists = {int(path.name[4:]): (path / "cpulist") for path in root.glob("node[0-9]*")}
    return {node: parse(text, {}) for node, path in lists.items() if (text := path.read_text().strip())}


def too_few(num_threads: int, processors: Processors) -> str:
    """A warning where threads would wait for each other's processors, else empty."""
    count = len(processors.cpus) or usable_cpus()
    if num_threads <= count:
        return ""
    return f"worker.num_threads is {num_threads} and the worker may use {count} processors: threads will wait for each other"


def _list(numbers: Mapping[int, object] | frozenset[int] | set[int]) -> str:
    return ",".join(map(str, sorted(numbers))) or "none"
