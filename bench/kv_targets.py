"""What Baton's KV transports have to reach beside memcpy and their peers, and whether measured figures reach it. Pure.

Figures are {engine: {size name: seconds}}; see SIZES. Baton's engines are "baton shm", "baton nixl", "baton tcp", "baton grpc", "baton gloo".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from targets import Verdict

Figures = Mapping[str, Mapping[str, float]]

SIZES = {
    "64 B": 64,
    "21B block": 3584 << 10,
    "64 KiB": 64 << 10,
    "1 MiB": 1 << 20,
    "16 MiB": 16 << 20,
    "256 MiB": 256 << 20,
}
LATENCIES = ("64 B", "21B block")
BULK = ("64 KiB", "1 MiB", "16 MiB", "256 MiB")
SHAPES = {"64 B": "tiny", "21B block": "block"}
"""Which of the pools of kv_baton_worker.py a size is measured with; "bulk" otherwise."""

MIN_SHM_OVER_MEMCPY = 0.9
MIN_SHM_OVER_NIXL = 1.5
MIN_NIXL_OVER_RAW = 0.9
MIN_TCP_OVER_PEERS = 1.0
MIN_GLOO_OVER_RAW = 0.9
MAX_BLOCK_S = 1e-3


def speed(figures: Figures, engine: str, size: str) -> float | None:
    """Bytes per second."""
    seconds = figures.get(engine, {}).get(size)
    return SIZES[size] / seconds if seconds else None


def over(figures: Figures, engine: str, size: str, *peers: str) -> float | None:
    """An engine's speed over that of the fastest of `peers`; None where one of the two is missing."""
    own = speed(figures, engine, size)
    others = [other for peer in peers if (other := speed(figures, peer, size)) is not None]
    return own / max(others) if own is not None and others else None


def verdicts(figures: Figures) -> Iterator[Verdict]:
    """All targets."""
    yield Verdict("shm over memcpy, 256 MiB", over(figures, "baton shm", "256 MiB", "memcpy"), MIN_SHM_OVER_MEMCPY)
    for size in ("16 MiB", "256 MiB"):
        yield Verdict(f"shm over NIXL, {size}", over(figures, "baton shm", size, "nixl"), MIN_SHM_OVER_NIXL)
    for size in ("16 MiB", "256 MiB"):
        yield Verdict(f"nixl over raw NIXL, {size}", over(figures, "baton nixl", size, "nixl"), MIN_NIXL_OVER_RAW)
    for size in ("1 MiB", "16 MiB", "256 MiB"):
        value = over(figures, "baton tcp", size, "nixl tcp", "mooncake")
        yield Verdict(f"tcp over the faster of NIXL and Mooncake on TCP, {size}", value, MIN_TCP_OVER_PEERS)
    for size in ("1 MiB", "16 MiB", "256 MiB"):
        value = over(figures, "baton gloo", size, "raw gloo")
        yield Verdict(f"gloo over raw Gloo, {size}", value, MIN_GLOO_OVER_RAW)
    block_s = figures.get("baton shm", {}).get("21B block")
    yield Verdict("shm, p50 of a 21B block, ms", None if block_s is None else block_s * 1e3, MAX_BLOCK_S * 1e3, True)
