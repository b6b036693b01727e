"""Element-wise work on rows, fused so that a row is read once: add and RMSNorm, rotary embedding and KV write, SwiGLU.

The arithmetic and its roundings are those of workers.model.decoder.layers and workers.model.decoder.layers.
Shapes: T rows, D hidden, F feed-forward width, H query heads, K key-value heads, C channels of a head, P = C/2 pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.runner import BLOCK_SIZE

_SWIGLU_WIDTH = 1024


@triton.jit
def _add_norm_kernel(
    x, y, weight, sums, normed, eps, HAS_Y: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PADDED_D)
    values = tl.load(x + t * D + d, mask=d < D, other=0.0)
    if HAS_Y:
        added = tl.load(y + t * D + d, mask=d < D, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)
        tl.store(sums + t * D + d, values, mask=d < D)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    scaled = (wide * scale).to(values.dtype).to(tl.float32)
    gain = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(normed + t * D + d, (scaled * gain).to(values.dtype), mask=d < D)


def add_norm(x_TD: Tensor, y_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + y, RMSNorm(x + y)), both [T, D]; y None stands for zero."""
    T, D = x_TD.shape
    sums, normed = x_TD if y_TD is None else torch.empty_like(x_TD), torch.empty_like(x_TD)
    _add_norm_kernel[(T,)](
        x_TD, x_TD if y_TD is None else y_TD, weight_D, sums, normed, eps,
        HAS_Y=y_TD is not None, D=D, PADDED_D=triton.next_power_of_2(D), num_warps=8 if D > 2048 else 4,
    )  # fmt: skip
    return sums, normed


@triton.jit
def _rotate_and_store_kernel(
    qkv, cos, sin, rows, layer, q,
    ROW_STRIDE: tl.constexpr, BLOCK_STRIDE: tl.constexpr, HALF_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, PADDED_HEADS: tl.constexpr, PADDED_P: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    position = tl.load(rows + t * ROW_STRIDE + 1)
    block = tl.load(rows + t * ROW_STRIDE + 2).to(tl.int64)
    P: tl.constexpr = C // 2
    h, p = tl.arange(0, PADDED_HEADS)[:, None], tl.arange(0, PADDED_P)[None, :]
    is_pair = (h < H + 2 * K) & (p < P)
    place = qkv + (t * (H + 2 * K) + h) * C + 2 * p
    even, odd = tl.load(place, mask=is_pair, other=0.0), tl.load(place + 1, mask=is_pair, other=0.0)
    angle = position * P + p
    is_turned = (h < H + K) & (p < P)  # values are not
    cos_HP = tl.load(cos + angle + h * 0, mask=is_turned, other=1.0)
    sin_HP = tl.load(sin + angle + h * 0, mask=is_turned, other=0.0)
    wide_even, wide_odd = even.to(tl.float32), odd.to(tl.float32)
    turned_even = (wide_even * cos_HP - wide_odd * sin_HP).to(q.dtype.element_ty)
    turned_odd = (wide_odd * cos_HP + wide_even * sin_HP).to(q.dtype.element_ty)
    is_query = (h < H) & (p < P)
    target = q + (t * H + h) * C + 2 * p
    tl.store(target, turned_even, mask=is_query)
    tl.store(target + 1, turned_odd, mask=is_query)
    is_kept = (h >= H) & is_pair
    is_half = h >= H + K
    head = h - H - tl.where(is_half, K, 0)
    slot = layer + block * BLOCK_STRIDE + tl.where(is_half, HALF_STRIDE, 0) + head * HEAD_STRIDE
    slot = slot + (position % B) * C + 2 * p
    tl.store(slot, turned_even, mask=is_kept)
    tl.store(slot + 1, turned_odd, mask=is_kept)


def rotate_and_store(
    qkv_TX: Tensor, rotation: tuple[Tensor, Tensor], rows: Tensor, layer_pool: Tensor, num_heads: int
) -> Tensor:
    """Rotated queries [T, H, C]; rotated keys, and values, go to their slots in `layer_pool` [blocks, 2, K, 64, C].

    `qkv_TX` is [T, (H + 2K) * C]; `rotation` the cosines and sines, fp32 [positions, C/2]; `rows` as in StepInputs.
    """
    T, (K, C) = qkv_TX.shape[0], (layer_pool.shape[2], layer_pool.shape[4])
    block_stride, half_stride, head_stride = layer_pool.stride()[:3]
    q_THC = torch.empty(T, num_heads, C, dtype=qkv_TX.dtype, device=qkv_TX.device)
    _rotate_and_store_kernel[(T,)](
        qkv_TX, *rotation, rows, layer_pool, q_THC,
        ROW_STRIDE=rows.stride(0), BLOCK_STRIDE=block_stride, HALF_STRIDE=half_stride, HEAD_STRIDE=head_stride,
        H=num_heads, K=K, C=C, PADDED_HEADS=triton.next_power_of_2(num_heads + 2 * K),
        PADDED_P=triton.next_power_of_2(C // 2), B=BLOCK_SIZE, num_warps=8 if num_heads > 24 else 4,
    )  # fmt: skip
    return q_THC


@triton.jit
def _swiglu_kernel(gate_up, y, F: tl.constexpr, WIDTH: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    gate = tl.load(gate_up + t * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + t * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y + t * F + f, product.to(y.dtype.element_ty), mask=f < F)


def swiglu(gate_up_TX: Tensor) -> Tensor:
    """silu(gate) * up, [T, F], of rows [T, 2F] that hold gate and up side by side; fp32 inside."""
    T, F = gate_up_TX.shape[0], gate_up_TX.shape[1] // 2
    y_TF = torch.empty(T, F, dtype=gate_up_TX.dtype, device=gate_up_TX.device)
    width = min(_SWIGLU_WIDTH, triton.next_power_of_2(F))
    _swiglu_kernel[(T, triton.cdiv(F, width))](gate_up_TX, y_TF, F=F, WIDTH=width, num_warps=4)
    return y_TF
