"""What each engine loads: the checkpoint, or a GGUF file made of it by llama.cpp's own converter, which its source carries."""

from __future__ import annotations

import subprocess
from pathlib import Path

from worker_process import HERE, Program, WorkerFailed

INSTALL = (
    "python3 -m venv llama && "
    "llama/bin/pip install llama-cpp-python==0.3.36 torch==2.13.0 transformers sentencepiece protobuf && "
    "llama/bin/pip download --no-deps --no-binary llama-cpp-python -d llama/src llama-cpp-python==0.3.36 && "
    "tar xzf llama/src/llama_cpp_python-0.3.36.tar.gz -C llama/src, then --llama-python llama/bin/python"
)
_CONVERTER = "src/llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py"


def model_path(program: Program, folder: Path, dtype: str) -> Path:
    """The checkpoint's folder, or for llama.cpp a file. Raises WorkerFailed with the reason."""
    if program.engine != "llama":
        return folder
    return gguf_file(folder, "bf16" if dtype == "bfloat16" else "f32", program.python)


def gguf_file(folder: Path, kind: str, python: str) -> Path:
    """`folder`'s weights as `kind` (bf16 or f32); converted only once. Raises WorkerFailed with the reason.

    `python` is an interpreter of a virtual environment laid out as INSTALL does.
    """
    target = folder / f"{kind}.gguf"
    if target.exists():
        return target
    found = sorted(Path(python).absolute().parents[1].glob(_CONVERTER))
    if not found:
        raise WorkerFailed(f"no converter in {_CONVERTER} beside {python}; to install: {INSTALL}")
    if not (folder / "tokenizer.model").exists():
        _run([python, str(HERE / "sentencepiece_model.py"), str(folder)])
    partial = folder / f"{kind}.partial"
    _run([python, str(found[-1]), str(folder), "--outtype", kind, "--outfile", str(partial)])
    return partial.rename(target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise WorkerFailed(f"cannot run {command[0]}: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise WorkerFailed(f"{Path(command[1]).name} failed: {lines[-1] if lines else done.returncode}")
