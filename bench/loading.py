"""Measures how long a worker's weights take to load: packed from the checkpoint, and copied from a file of packed weights.

python bench/loading.py --models dense big --threads 1 2

Each load has a process of its own. Files are read once before a load, unless --cold asks the system to forget them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from model_shapes import SHAPES
from random_checkpoints import random_checkpoint

from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weights import Checkpoint
from workers.model.native.build import build
from workers.model.native.ernie import NativeErnie
from workers.model.native.library import Library
from workers.model.native.packed import PackedFile


def load(folder: Path, num_threads: int, packed_folder: Path) -> dict[str, float]:
    """Loads in this process; keeps packed weights in the folder when there are none."""
    library = Library(build(None))
    packed = PackedFile(packed_folder, 1 << 40, (str(folder),), num_threads, worth_bytes=0)
    torch.set_num_threads(num_threads)
    started, started_cpu, memory = time.perf_counter(), time.process_time(), _status("VmRSS")
    checkpoint = Checkpoint(folder)
    with torch.inference_mode():
        model = NativeErnie(ErnieConfig.load(folder), checkpoint, torch.bfloat16, library, num_threads, packed=packed)
    found = {
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - started_cpu,
        "growth_bytes": _status("VmHWM") - memory,
    }
    if model.keeping is not None:
        model.keeping.join()
        found["kept_after_s"] = time.perf_counter() - started
    return found


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _prepare(files: list[Path], cold: bool) -> None:
    for path in files:
        with path.open("rb", buffering=0) as stream:
            if cold:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.read(8 << 20):
                    pass


def _measure(folder: Path, num_threads: int, packed_folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--load", str(folder), str(num_threads), str(packed_folder)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["dense", "big"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="from the disk rather than from the page cache")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "baton-bench")
    parser.add_argument("--load", nargs=3, metavar=("FOLDER", "THREADS", "PACKED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        folder, num_threads, packed_folder = options.load
        print(json.dumps(load(Path(folder), int(num_threads), Path(packed_folder))))
        return
    for model in options.models:
        folder = random_checkpoint(SHAPES[model], options.cache)
        weights = sorted(folder.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in weights)
        for _ in range(options.repeats):
            for num_threads in options.threads:
                packed_folder = Path(tempfile.mkdtemp(dir=options.cache))
                try:
                    for way in ("packed from the checkpoint", "copied from its packed file"):
                        _prepare([*weights, *packed_folder.glob("*.packed")], options.cold)
                        found = _measure(folder, num_threads, packed_folder)
                        print(
                            f"{model}, {num_threads} threads, {way}: {found['wall_s']:.2f} s, of the processor "
                            f"{found['cpu_s']:.2f} s, peak growth / weights {found['growth_bytes'] / size:.3f}",
                            flush=True,
                        )
                finally:
                    shutil.rmtree(packed_folder)


if __name__ == "__main__":
    main()
