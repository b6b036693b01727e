"""Judges what was seen of a host and of a running cluster, in sentences that say what to do; asks nobody."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cluster.doctor.ports import PortFacts

MIN_FILES = 8192
MIN_SHARED_BYTES = 256 << 20
MIN_MEMORY_BYTES = 1 << 30
MAX_CLOCK_DIFFERENCE_S = 2.0
MAX_FRAME_AGE_S = 5.0
MAX_NAMED = 10


class Verdict(StrEnum):
    """WARN: it works, but not as well as it could, or not for long."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    verdict: Verdict
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:<5} {self.subject}: {self.text}"


def ok(subject: str, text: str) -> Finding:
    return Finding(Verdict.OK, subject, text)


def warn(subject: str, text: str) -> Finding:
    return Finding(Verdict.WARN, subject, text)


def fail(subject: str, text: str) -> Finding:
    return Finding(Verdict.FAIL, subject, text)


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a host has for Baton's processes."""

    python: str
    baton: str
    ray: str
    torch: str
    kernels: tuple[str, ...]
    """Instruction sets with kernels built ahead that this processor has, best first."""
    instruction_sets: tuple[str, ...]
    """Those that this processor has."""
    num_cpus: int
    memory_bytes: int
    shared_bytes: int
    """Free in /dev/shm; 0: there is none."""
    num_files: int
    gpus: tuple[str, ...]
    has_compiler: bool


def judge_host(facts: HostFacts) -> list[Finding]:
    found = [ok("versions", f"baton {facts.baton}, Python {facts.python}, Ray {facts.ray}, torch {facts.torch}")]
    if facts.kernels:
        found.append(ok("kernels", f"built ahead for {', '.join(facts.kernels)}"))
    elif facts.instruction_sets and facts.has_compiler:
        found.append(
            warn("kernels", f"none are built ahead for {facts.instruction_sets[0]}: the first start compiles them")
        )
    else:
        found.append(
            warn(
                "kernels",
                "none are built ahead and there is no compiler: PyTorch computes, slower; install a wheel that has them",
            )
        )
    found.append(ok("processors", str(facts.num_cpus)))
    memory = f"{facts.memory_bytes / 2**30:.1f} GiB are available"
    found.append(
        ok("memory", memory)
        if facts.memory_bytes >= MIN_MEMORY_BYTES
        else warn("memory", f"only {memory}: raise the container's limit")
    )
    shared = f"{facts.shared_bytes / 2**20:.0f} MiB are free"
    found.append(
        ok("/dev/shm", shared)
        if facts.shared_bytes >= MIN_SHARED_BYTES
        else warn(
            "/dev/shm",
            f"only {shared}; Ray's object store is there: give the container more (--shm-size, an emptyDir with medium Memory)",
        )
    )
    files = f"{facts.num_files} may be open"
    found.append(
        ok("files", files)
        if facts.num_files >= MIN_FILES
        else warn("files", f"only {files}, and each connection is one: raise the hard limit (ulimit -Hn, LimitNOFILE)")
    )
    found.append(ok("GPUs", ", ".join(facts.gpus) if facts.gpus else "none"))
    return found


def judge_port(facts: PortFacts, own_pids: Iterable[int] = ()) -> Finding:
    """`own_pids`: of processes that are known as Baton's, whatever their names."""
    port = f"{facts.port} ({facts.setting})"
    if facts.is_free:
        return ok("port", f"{port} is free")
    if facts.error:
        return warn("port", f"{port}: {facts.error}; choose another host")
    if not facts.is_taken:
        return warn("port", f"{port} is not for this user, though nobody listens there: choose one from 1024 on")
    if not facts.takers:
        return warn("port", f"{port} is taken by a process that this user may not see: stop it, or choose another port")
    own = set(own_pids)
    takers = ", ".join(f"{each.name} (process {each.pid})" for each in facts.takers[:MAX_NAMED])
    if any(each.pid in own or each.name.startswith(("baton", "ray::")) for each in facts.takers):
        return ok("port", f"{port} is taken by {takers}")
    return warn("port", f"{port} is taken by {takers}: stop it, or choose another port")


def judge_clocks(here_s: float, redis_s: float) -> Finding:
    """Leases go by Redis' clock; generations by those of the workers' hosts."""
    difference = abs(here_s - redis_s)
    if difference <= MAX_CLOCK_DIFFERENCE_S:
        return ok("clocks", f"this host's and Redis' are {difference:.2f} s apart")
    return warn(
        "clocks", f"this host's and Redis' are {difference:.0f} s apart: set up NTP; generations are numbered by time"
    )


def judge_workers(status: Mapping[str, Any]) -> list[Finding]:
    """From the JSON of GET /admin/status."""
    views = list(status.get("workers", ()))
    connected = [view for view in views if view["connected"]]
    if not views:
        return [
            fail(
                "workers",
                "the router knows none: look at the logs of their pods, and whether store.cluster is the same everywhere",
            )
        ]
    found = []
    away = _names(view for view in views if not view["connected"])
    if away:
        found.append(
            fail(
                "workers",
                f"not connected: {away}; are they alive, and do they show certificates of the same authority?",
            )
        )
    able = [view for view in connected if not view["status"]["is_draining"] and not view["status"]["is_rebuilding"]]
    roles = {role: [v for v in able if v["status"]["role"] in (role, "mixed")] for role in ("prefill", "decode")}
    if not roles["decode"]:
        found.append(fail("roles", "no worker can decode: start one, or `baton switch-role` one"))
    if not roles["prefill"]:
        found.append(warn("roles", "no worker prefills: decode workers compute prompts themselves"))
    if roles["decode"] and roles["prefill"]:
        found.append(ok("roles", f"{len(roles['prefill'])} can prefill, {len(roles['decode'])} can decode"))
    prints = {view["status"]["model"]["fingerprint"] for view in connected}
    if len(prints) > 1:
        found.append(
            fail(
                "fingerprints",
                f"{len(prints)} different ones among workers: same checkpoint, dtype and kernels? Only those of one are used",
            )
        )
    else:
        found.append(ok("fingerprints", "all workers can exchange KV"))
    for what, names in (
        ("draining", _names(v for v in connected if v["status"]["is_draining"])),
        ("rebuilding, a rank is missing", _names(v for v in connected if v["status"]["is_rebuilding"])),
        ("silent", _names(v for v in connected if v.get("frame_age_s", 0.0) > MAX_FRAME_AGE_S)),
    ):
        if names:
            found.append(warn("workers", f"{what}: {names}"))
    if not away:
        found.append(ok("workers", f"{len(connected)} are connected"))
    return found


def judge_answer(answer: Mapping[str, Any], prefill: Collection[str] = (), is_long: bool = False) -> Finding:
    """Of one request with `trace`. `prefill`: workers that only prefill; `is_long`: its prompt is one for them."""
    ways = (answer.get("baton") or {}).get("choices") or [{}]
    way = ways[0]
    usage = answer.get("usage") or {}
    if not usage.get("completion_tokens"):
        return fail("request", "a completion came without tokens")
    by, at = way.get("prefill_worker"), way.get("decode_worker")
    if is_long and prefill and (not by or by == at):
        return fail(
            "request",
            f"{at} computed a long prompt itself though {len(prefill)} workers prefill: handoffs fail; look at the logs of {at}, "
            "and at baton_kv_handoff_recoveries_total",
        )
    return ok("request", f"{usage['completion_tokens']} tokens, prefill on {by or 'the same worker'}, decode on {at}")


def is_well(findings: Iterable[Finding]) -> bool:
    return all(finding.verdict is not Verdict.FAIL for finding in findings)


def _names(views: Iterable[Mapping[str, Any]]) -> str:
    names = sorted(str(view["status"]["worker_id"]) for view in views)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
