"""Every product of the PyTorch path gives a row the same bits whatever rows are beside it, and where not, it is noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.unit.model_configs import (
    Oracle,
    load,
    logits,
    moe_with_shared_experts,
    prefill,
    random_tokens,
    small_dense,
)
from workers.model.cpu.self_test import linears_are_invariant
from workers.model.decoder.layers import Linear, RMSNorm, silu
from workers.model.decoder.moe import ExpertRouter
from workers.model.parallel.expert_dispatch import combine, dispatch


class MoodyLinear(Linear):
    """A kernel as a machine might have it: other bits for other numbers of rows."""

    def _multiply(self, x_TI: Tensor) -> Tensor:
        return super()._multiply(x_TI) * (1 + 1e-6 * x_TI.shape[0])


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_gives_a_row_the_same_bits_in_any_batch_at_any_place_on_any_number_of_threads(
    dtype: torch.dtype, tiled: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs in ((48, 20), (384, 256), (1024, 64)):
        x_TI = torch.randn(70, inputs, generator=generator).to(dtype)
        linear = Linear(torch.randn(outputs, inputs, generator=generator).to(dtype))
        if tiled:
            linear.use_tiles()
        y_TO = linear(x_TI)
        torch.testing.assert_close(y_TO.float(), x_TI.float() @ linear.weight().float().T, atol=0.3, rtol=0.02)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in (1, 2, 3, 5, 31, 33, 70):
                for first in {0, 1, 70 - rows} if rows < 70 else {0}:
                    part = slice(first, first + rows)
                    assert torch.equal(linear(x_TI[part].contiguous()), y_TO[part]), (threads, rows, first)
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_is_given_back_bit_for_bit(dtype: torch.dtype) -> None:
    weight_OI = torch.randn(20, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(Linear(weight_OI).weight(), weight_OI)


@pytest.mark.parametrize("maker", [small_dense, moe_with_shared_experts])
def test_the_self_test_is_given_every_product_of_a_model(maker: Callable[[Path], Oracle], tmp_path: Path) -> None:
    """Attention's, routers', experts', shared experts' and the head's."""
    model = load(maker(tmp_path).folder, native=False).model
    known = {id(linear) for linear in model.linears}
    assert {id(linear) for linear in linears_inside(model)} == known and len(known) > 4


def linears_inside(value: object) -> Iterator[Linear]:
    """Every linear that can be reached from an object of this project."""
    if isinstance(value, Linear):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from linears_inside(item)
    elif type(value).__module__.startswith("workers.model"):
        names = getattr(type(value), "__slots__", None) or vars(value)
        for name in names:
            yield from linears_inside(getattr(value, name))


def test_norms_and_router_give_a_row_the_same_bits_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(70, 100, generator=generator)
    norm = RMSNorm(torch.randn(100, generator=generator), 1e-5)
    router = ExpertRouter(torch.randn(12, 100, generator=generator), torch.randn(12, generator=generator), 3, 1e-12)
    together = (norm(x_TD), *router(x_TD))
    for part in (slice(0, 1), slice(69, 70), slice(3, 36), slice(1, 70)):
        for found, expected in zip((norm(x_TD[part]), *router(x_TD[part])), together, strict=True):
            assert torch.equal(found, expected[part])


def test_the_self_test_notices_a_moody_kernel_and_tiles_mend_it() -> None:
    linear = MoodyLinear(torch.randn(20, 48, generator=torch.Generator().manual_seed(0)))
    assert not linears_are_invariant([linear])
    linear.use_tiles()
    assert linears_are_invariant([linear])


class PlacedLinear(Linear):
    """Another kernel as a machine might have it: other bits at other places of a tile."""

    def _multiply(self, x_TI: Tensor) -> Tensor:
        return super()._multiply(x_TI) * (1 + 1e-6 * torch.arange(x_TI.shape[0])[:, None])


def test_the_self_test_notices_a_kernel_that_tiles_do_not_mend() -> None:
    linear = PlacedLinear(torch.randn(20, 48, generator=torch.Generator().manual_seed(0)))
    linear.use_tiles()
    assert not linears_are_invariant([linear])


def test_a_model_in_tiles_computes_the_same_function(tmp_path: Path) -> None:
    runner, tokens = load(small_dense(tmp_path).folder, native=False), random_tokens(90)
    packed = logits(runner, prefill(tokens))
    assert runner.warnings == ()
    for linear in runner.model.linears:
        linear.use_tiles()
    torch.testing.assert_close(logits(runner, prefill(tokens)), packed, atol=1e-4, rtol=1e-4)


def test_silu_has_the_same_bits_at_any_place_of_a_tensor() -> None:
    x = torch.randn(1003, generator=torch.Generator().manual_seed(0)) * 5
    y = silu(x)
    torch.testing.assert_close(y, torch.nn.functional.silu(x))
    for first, last in ((0, 1), (1, 18), (5, 1003), (990, 1003)):
        assert torch.equal(silu(x[first:last]), y[first:last])


def test_combine_undoes_dispatch() -> None:
    x_TD = torch.arange(12.0).view(4, 3)
    experts_Tk = torch.tensor([[2, 0], [0, 1], [2, 1], [0, 2]])
    sent = dispatch(x_TD, experts_Tk, num_experts=4)
    assert sent.counts_E == [3, 2, 3, 0]
    assert torch.equal(sent.rows_AD, x_TD[[0, 1, 3, 1, 2, 0, 2, 3]])
    weights_Tk = torch.tensor([[0.25, 0.75]]).repeat(4, 1)
    assert torch.equal(combine(sent.rows_AD, weights_Tk, sent.receipt), x_TD)
