"""Decides which transports two workers try, in which order. Pure; opens nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

BEST_FIRST = ("loopback", "cuda_ipc", "shm", "nccl", "nixl", "tcp", "gloo", "grpc")
"""Every transport, the fastest first: memory of one process, device, host; then networks as measured (docs/benchmarks.md)."""
SAME_HOST = frozenset({"loopback", "cuda_ipc", "shm"})


def negotiate(
    wanted: Sequence[str], offers: Mapping[str, bytes], source_host: str, target_host: str
) -> tuple[str, ...]:
    """The receiver's `wanted` transports, in its order, that the sender has offered and that these two hosts allow.

    A name said twice counts once; names that nobody knows are passed over, so that releases can differ.
    """
    is_near = source_host == target_host
    usable = [
        name for name in dict.fromkeys(wanted)
        if name in BEST_FIRST and offers.get(name) is not None and (is_near or name not in SAME_HOST)
    ]  # fmt: skip
    return tuple(usable)
