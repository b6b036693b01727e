"""What is asked of a plan: targets, a trace, candidate profiles; and what no worker could ever meet. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.sim.profiles.profile import Profile
from workers.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds to the first token, and for each one after it; None: any."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.ttft_s is not None:
            parts.append(f"TTFT {self.ttft_s:g} s")
        if self.tpot_s is not None:
            parts.append(f"TPOT {self.tpot_s * 1000:g} ms")
        return " and ".join(parts)


class Asked(Protocol):
    """What a plan reads of a request of a trace (cluster.sim.load.TraceRequest)."""

    @property
    def at_s(self) -> float: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...


def read_slo(text: str) -> Slo:
    """`ttft=2,tpot=0.05`, in seconds; one of both is enough. Raises InvalidConfig."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in ("ttft", "tpot") or not equals or name in found:
            raise InvalidConfig(f"--slo must look like ttft=2,tpot=0.05 (seconds); it is {text!r}")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = float("nan")
        if not 0 < found[name] < 86_400:
            raise InvalidConfig(f"--slo {name} must be a number of seconds above 0; it is {value!r}")
    return Slo(found.get("ttft"), found.get("tpot"))


def floor_ttft_s(profile: Profile, prompt_tokens: int) -> float:
    """Of a request that is alone on an idle cluster and computed where it decodes."""
    seconds, done = 4 * profile.router_s, 0
    while done < prompt_tokens:
        chunk = min(profile.max_batched_tokens, prompt_tokens - done)
        seconds += profile.step_s(chunk, chunk * done + chunk * (chunk + 1) // 2, 0, 0)
        done += chunk
    return seconds


def floor_tpot_s(profile: Profile, request: Asked) -> float:
    """Of the same request, alone."""
    return profile.step_s(0, 0, 1, request.prompt_tokens + request.output_tokens // 2)


def require_reachable(profile: Profile, requests: Sequence[Asked], slo: Slo, share: float) -> None:
    """Raises InvalidConfig when not even idle workers of this profile could keep the targets for `share` of the requests, or when
    too many do not fit a worker."""
    too_long = sum(each.prompt_tokens + each.output_tokens > profile.max_model_len for each in requests)
    if too_long > (1 - share) * len(requests):
        raise InvalidConfig(
            f"{too_long} of {len(requests)} requests of the trace are longer than the {profile.max_model_len} tokens that "
            f"a worker of {profile.name} takes"
        )
    checks = (
        ("ttft", slo.ttft_s, sorted(floor_ttft_s(profile, each.prompt_tokens) for each in requests)),
        ("tpot", slo.tpot_s, sorted(floor_tpot_s(profile, each) for each in requests)),
    )
    for name, target, floors in checks:
        needed = floors[min(len(floors) - 1, int(share * len(floors)))]
        if target is not None and needed > target:
            raise InvalidConfig(
                f"--slo {name}={target:g} can be met by no worker of {profile.name} for {share:.0%} of the requests: idle ones "
                f"take {needed:.3g} s"
            )


def busiest(requests: Sequence[Asked], count: int) -> tuple[int, int]:
    """First and last+1 of the `count` consecutive requests with the most tokens a second."""
    if len(requests) <= count:
        return 0, len(requests)
    work = [0]
    for each in requests:
        work.append(work[-1] + each.prompt_tokens + 4 * each.output_tokens)
    best, best_rate = 0, -1.0
    for first in range(0, len(requests) - count + 1, max(1, count // 16)):
        span = requests[first + count - 1].at_s - requests[first].at_s
        rate = (work[first + count] - work[first]) / max(span, 1e-9)
        if rate > best_rate:
            best, best_rate = first, rate
    return best, best + count


def least_workers(profile: Profile, requests: Sequence[Asked]) -> int:
    """With fewer, workers would have to work longer than the trace lasts, even in full batches and with half of all prompts cached."""
    chunk, batch = profile.max_batched_tokens, profile.max_num_seqs
    prompts = sum(each.prompt_tokens for each in requests)
    outputs = sum(each.output_tokens for each in requests)
    mean = prompts / len(requests)
    seconds = prompts / 2 * profile.step_s(chunk, int(chunk * mean / 2), 0, 0) / chunk
    seconds += outputs * profile.step_s(0, 0, batch, int(batch * mean)) / batch
    span = requests[-1].at_s - requests[0].at_s
    return max(1, int(seconds / max(span, 1e-9)))
