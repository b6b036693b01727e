"""A made-up simulation with everything that reports show: two roles that switch, queues that grow and shrink, faults, refusals."""

from __future__ import annotations

import math
import random

from cluster.sim.record import FaultRecord, RequestRecord, RouterSample, RunRecord, Switch, WorkerSample


def made_up_record(
    num_workers: int = 8, num_requests: int = 600, duration_s: float = 120.0, seed: int = 0
) -> RunRecord:
    """Repeats itself for the same arguments. One worker in eight switches from prefill to decode and back."""
    rng = random.Random(seed)
    record = RunRecord({"trace": "made up", "workers": num_workers, "policy": "kv_aware"}, seed, duration_s=duration_s)
    for index in range(num_requests):
        arrival = duration_s * 0.9 * index / num_requests
        rush = 0.5 + 0.5 * math.sin(arrival / duration_s * 6)
        queue, compute, move = rush * rng.random(), 0.2 + rng.random() * 0.3, 0.02
        tokens = rng.randint(1, 200)
        first = arrival + queue + compute + move
        outcome = "ok" if index % 50 else "QUEUE_FULL"
        ok = outcome == "ok"
        record.requests.append(
            RequestRecord(
                name=f"r{index}",
                arrival_s=arrival,
                prompt_tokens=1000,
                cached_tokens=256 if index % 2 else 0,
                output_tokens=tokens if ok else 0,
                first_token_s=first if ok else None,
                finished_s=first + (tokens - 1) * 0.02 * (1 + rush) if ok else arrival + 0.001,
                queue_s=queue,
                transfer_s=move,
                prefill_worker=f"worker-{index % num_workers}",
                decode_worker=f"worker-{(index + 1) % num_workers}",
                outcome=outcome,
                ttft_target_s=1.2,
                tpot_target_s=0.035,
                max_gap_s=0.05,
            )
        )
    for moment in range(int(duration_s)):
        waiting = int(20 * max(0.0, math.sin(moment / duration_s * 6)))
        record.router_samples.append(RouterSample(float(moment), waiting, 2 * waiting))
        for number in range(num_workers):
            if number == 3 and moment > duration_s * 0.7:
                continue  # killed
            switched = number % 8 == 0 and duration_s / 3 < moment < duration_s * 2 / 3
            role = "prefill" if number % 2 == 0 and not switched else "decode"
            busy = min(1.0, 0.3 + 0.6 * max(0.0, math.sin(moment / 20 + number)))
            record.samples.append(WorkerSample(float(moment), f"worker-{number}", role, waiting, 1, busy / 2, busy))
    for number in range(0, num_workers, 8):
        record.switches.append(Switch(duration_s / 3, f"worker-{number}", "decode", 2))
        record.switches.append(Switch(duration_s * 2 / 3, f"worker-{number}", "prefill", 3))
    record.faults.append(FaultRecord(duration_s * 0.7, "kill", "worker-3", "at 84 s: kill worker-3"))
    record.num_events, record.wall_s = 100_000, 2.0
    return record
