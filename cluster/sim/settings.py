"""What a simulation is told: which workers, how they and their routers are set, how exactly it looks. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.sim.product import InvalidConfig, Role, RolesConfig
from cluster.sim.profiles.profile import Profile


@dataclass(frozen=True, slots=True)
class Settings:
    """Beside trace and faults, all that decides how a simulation goes."""

    profile: Profile = field(default_factory=Profile)
    num_prefill: int = 0
    num_decode: int = 0
    num_mixed: int = 0
    num_routers: int = 1
    seed: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    router: dict[str, Any] = field(default_factory=dict)
    """Settings of router.config.RouterConfig that differ from what fits the cluster."""
    worker: dict[str, Any] = field(default_factory=dict)
    """Of workers.config.WorkerConfig."""
    roles: RolesConfig | None = None
    """The routers have role controllers; None: roles change only as faults say."""
    lease_ttl_s: float = 4.0
    num_parts: int = 1
    """Parts of a KV block that travel by themselves, as layers do: with more a prompt's KV leaves while it is computed, and a
    simulation takes longer."""
    max_leap_s: float = 1.0
    """Steps that only decode are taken together for so long at most; 0: one by one."""
    sample_interval_s: float = 1.0
    check_interval: int = 0
    """Events between two looks at everything that must hold; 0: at the end only."""
    patience_s: float = 1800.0
    """After the last arrival every request must have ended within this time."""

    def __post_init__(self) -> None:
        if self.num_prefill + self.num_mixed == 0:
            raise InvalidConfig("no worker could prefill: give the split at least one prefill or mixed worker")
        if self.num_decode + self.num_mixed == 0:
            raise InvalidConfig("no worker could decode: give the split at least one decode or mixed worker")
        if self.num_routers < 1:
            raise InvalidConfig("a cluster needs at least one router")

    @property
    def workers(self) -> list[tuple[str, Role]]:
        """Names and roles."""
        pools = ((Role.PREFILL, self.num_prefill), (Role.DECODE, self.num_decode), (Role.MIXED, self.num_mixed))
        return [(f"{role}-{at}", role) for role, count in pools for at in range(count)]

    @property
    def routers(self) -> list[str]:
        return [f"router-{at}" for at in range(self.num_routers)]
