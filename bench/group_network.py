"""Two ranks of a worker in two network namespaces: expert rows and KV cross a real interface. Prints what was checked and measured, as JSON.

Needs root. The second rank also has a PID and a UTS namespace of its own, so it cannot join the leader's memory: to it
the other end of the cable is another host. Exit code 3: namespaces are not permitted here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEADER, FOLLOWER, PORT = "10.213.7.1", "10.213.7.2", 29700
NOT_PERMITTED = 3
PROMPTS = [[300 + (start + 11 * at) % 900 for at in range(length)] for start, length in ((0, 200), (5, 330), (9, 130))]
OUTPUT_TOKENS = 24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=("lead", "follow"), help="one rank, inside its namespace; without it: both")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--model", default=str(ROOT / "models" / "ernie-4.5-tiny"))
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.role == "follow":
        return follow(args)
    if args.role == "lead":
        print(json.dumps(lead(args), indent=1))
        return 0
    return run_both(sys.argv[1:])


def run_both(arguments: list[str]) -> int:
    """Lays a cable between two namespaces and runs a rank at each end."""
    names = [f"baton-{os.getpid()}-{end}" for end in ("a", "b")]
    ends = [f"bt{os.getpid() % 100000}{end}" for end in ("a", "b")]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, (LEADER, FOLLOWER), strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        own = [sys.executable, __file__, *arguments]
        apart = ["unshare", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        follower = subprocess.Popen(["ip", "netns", "exec", names[1], *apart, *own, "--role", "follow"])
        try:
            return subprocess.run(["ip", "netns", "exec", names[0], *own, "--role", "lead"], timeout=240).returncode
        finally:
            follower.kill()
            follower.wait()
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        reason = getattr(error, "stderr", b"") or str(error).encode()
        print(f"network namespaces are not permitted here: {reason.decode().strip()}")
        return NOT_PERMITTED
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def follow(args: argparse.Namespace) -> int:
    from workers.group.follower import Follower

    follower = Follower(config_of(args), 1, "cable")
    while follower.serve(LEADER, PORT) != "the group was stopped":
        time.sleep(0.2)  # the leader does not listen yet
    return 0


def lead(args: argparse.Namespace) -> dict[str, object]:
    """Runs prompts on the group and on one rank, and compares tokens and KV; then moves KV back and forth."""
    import torch

    from workers.group.memory import take_heads
    from workers.group.runner import GroupRunner
    from workers.model.cpu.runner import TorchRunner
    from workers.model.loading import ServedModel
    from workers.text.tokenizer import Tokenizer
    from workers.worker import make_engine

    torch.set_num_threads(1)
    config = config_of(args)
    tokenizer = Tokenizer.load(config.model)
    ranks = GroupRunner.load(config, host=LEADER, port=PORT, token="cable")
    group = ServedModel(ranks, tokenizer, "group")
    assert ranks.wait_serving(120), "the ranks did not meet"
    before = interface_bytes()
    tokens, seconds, steps = generate(make_engine(config, group))
    rows_bytes = sum(done.sent_bytes for done in ranks.last_done.values())
    memory = ranks.kv_memory
    layout = memory.layout
    began = time.perf_counter()
    memory.expose(range(layout.num_blocks))
    expose_s = time.perf_counter() - began
    alone = TorchRunner.load(replace(config, parallel=type(config.parallel)()))
    golden, _, _ = generate(make_engine(config, ServedModel(alone, tokenizer, "alone")))
    blocks = {memory.block(at, 0, layout.num_layers).tobytes() for at in range(layout.num_blocks)}
    golden_blocks = [
        block.tobytes()
        for at in range(alone.kv_memory.layout.num_blocks)
        if (block := alone.kv_memory.block(at, 0, layout.num_layers)).any()
    ]
    last = layout.num_blocks - 1
    num_heads = layout.num_kv_heads // args.tensor_parallel
    first_head = layout.num_kv_heads - num_heads  # those of the rank that is away
    memory.block(last, 0, layout.num_layers)[:] = memory.block(0, 0, layout.num_layers)
    memory.adopt([last])
    memory.block(last, 0, layout.num_layers)[:] = 0
    memory.expose([last])
    moved = memory.num_moved_bytes  # type: ignore[attr-defined]
    shares = [status.shares_memory for status in ranks.rank_status()]
    sent = interface_bytes() - before
    ranks.stop()
    return {
        "tensor_parallel": args.tensor_parallel,
        "tokens_equal_one_rank": tokens == golden,
        "kv_blocks_equal_one_rank": sum(block in blocks for block in golden_blocks),
        "kv_blocks": len(golden_blocks),
        "adopted_heads_came_back": take_heads(memory, [last], first_head, num_heads)
        == take_heads(memory, [0], first_head, num_heads),
        "ranks_in_leaders_memory": shares,
        "interface_bytes": sent,
        "expert_row_bytes": rows_bytes,
        "kv_bytes_between_hosts": moved,
        "kv_expose_MB_per_s": round(moved / expose_s / 1e6, 1),
        "ms_per_step": round(seconds / steps * 1e3, 2),
    }


def generate(engine: object) -> tuple[list[list[int]], float, int]:
    """Tokens of all prompts, the time they took and the number of steps."""
    from workers.request import Request, SamplingParams

    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
    for index, prompt in enumerate(PROMPTS):
        engine.add(index, Request(str(index), tuple(prompt), params))  # type: ignore[attr-defined]
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    began, steps = time.perf_counter(), 0
    while engine.has_work:  # type: ignore[attr-defined]
        steps += 1
        for index, output in engine.step().outputs:  # type: ignore[attr-defined]
            tokens[index] += output.token_ids
    return tokens, time.perf_counter() - began, steps


def interface_bytes() -> int:
    """Bytes in both directions over this namespace's end of the cable."""
    total = 0
    for name in os.listdir("/sys/class/net"):
        if name != "lo":
            statistics = Path("/sys/class/net") / name / "statistics"
            total += sum(int((statistics / f"{way}_bytes").read_text()) for way in ("rx", "tx"))
    return total


def config_of(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    from workers.config import ParallelConfig, WorkerConfig

    parallel = ParallelConfig(expert_parallel=2, tensor_parallel=args.tensor_parallel)
    return WorkerConfig(
        model=args.model, max_model_len=512, kv_memory_bytes=8_000_000, num_threads=1, parallel=parallel
    )


if __name__ == "__main__":
    sys.exit(main())
