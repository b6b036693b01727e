"""Compiles every Triton kernel, as its launcher calls it for ERNIE-4.5-21B-A3B, for a GPU that need not be there.

python tests/unit/compile_kernels.py 90   prints {kernel: bytes of shared memory} for compute capability 9.0
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from workers.model.cuda.kernels.decode_attention import decode_attention
from workers.model.cuda.kernels.experts import choose_experts, combine
from workers.model.cuda.kernels.matmul import grouped_matmul, matmul, tile_for
from workers.model.cuda.kernels.prefill_attention import prefill_attention
from workers.model.cuda.kernels.rows import add_norm, rotate_and_store, swiglu

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Compiler:
    """Stands in for JITFunction.run: compiles for `capability` and launches nothing."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.shared_bytes: dict[str, int] = {}

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        values = dict(zip(names, args, strict=False)) | {k: v for k, v in keywords.items() if k in names}
        options = {k: v for k, v in keywords.items() if k not in names}
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=self.target, options=options)
        name = f"{kernel.__module__.rsplit('.', 1)[-1]}.{kernel.__name__}"
        self.shared_bytes[name] = max(compiled.metadata.shared, self.shared_bytes.get(name, 0))


def launch_all(dtype: torch.dtype) -> None:
    H, K, C, D, F, E, k, blocks = 20, 4, 128, 2560, 1536, 64, 6, 5

    def integers(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    def values(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    layer, q, rows = values(2, 28, 2, K, 64, C)[:, 1], values(2, H, C), integers(2, 3 + blocks)
    x, cosines = values(2, D), torch.zeros(8, C // 2)
    decode_attention(q, layer, rows)
    prefill_attention(q, layer, integers(1, 5), integers(1, blocks))
    add_norm(x, None, values(D), 1e-5)
    add_norm(x, x, values(D), 1e-5)
    rotate_and_store(values(2, (H + 2 * K) * C), (cosines, cosines), rows, layer, H)
    swiglu(values(2, 2 * F))
    choose_experts(torch.zeros(2, E), torch.zeros(E), k, 1e-12)
    combine(values(2 * k, D), torch.zeros(2 * k, dtype=torch.int64), torch.zeros(2, k), x)
    for is_decode in (True, False):
        matmul(x, values(64, D), tile_for(is_decode, dtype))
        matmul(x.float(), torch.zeros(E, D), tile_for(is_decode, torch.float32))
        grouped_matmul(x, values(E, 64, D), integers(E), tile_for(is_decode, dtype))


def main() -> None:
    compiler = Compiler(int(sys.argv[1]))
    JITFunction.run = lambda self, *args, **keywords: compiler.run(self, *args, **keywords)
    launch_all(torch.bfloat16)
    print(json.dumps(compiler.shared_bytes))


if __name__ == "__main__":
    main()
