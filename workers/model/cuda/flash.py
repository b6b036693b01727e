"""FlashAttention 3 for prompt chunks, where its package is installed and may be used; never in deterministic mode.

It is not part of torch's wheel, runs on compute capability 9 only, and its tiles begin where a chunk begins, so the bits
of a row depend on how its prompt was cut.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from workers.model.cuda.step_inputs import PrefillInputs

logger = logging.getLogger(__name__)

Attention = Callable[[Tensor, Tensor, PrefillInputs], Tensor]
"""(q [T, H, C], pool of one layer [blocks, 2, K, 64, C], inputs) gives the output [T, H*C]."""


def find_flash_attention(device: torch.device, dtype: torch.dtype) -> Attention | None:
    """Paged FlashAttention 3 by way of torch.nn.attention.varlen, or None."""
    if device.type != "cuda" or dtype is not torch.bfloat16 or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        from torch.nn.attention import activate_flash_attention_impl
        from torch.nn.attention.varlen import varlen_attn

        if not {"block_table", "seqused_k"} <= set(inspect.signature(varlen_attn).parameters):
            return None
        activate_flash_attention_impl("FA3")
    except Exception as error:  # whatever its package raises on import, prompts can be computed without it
        logger.info("FlashAttention 3 is not available (%s); prompts run through Triton", error)
        return None
    return _attend


def _attend(q_THC: Tensor, layer_pool: Tensor, inputs: PrefillInputs) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    keys, values = (layer_pool[:, half].transpose(1, 2) for half in (0, 1))  # [blocks, 64, K, C], no copy
    output: Tensor = varlen_attn(  # type: ignore[assignment]  # a pair only where aux is asked for
        q_THC, keys, values, inputs.cuts, None, inputs.most_rows, inputs.longest,
        window_size=(-1, 0), enable_gqa=True, seqused_k=inputs.ends, block_table=inputs.tables,
    )  # fmt: skip
    return output.flatten(1)
