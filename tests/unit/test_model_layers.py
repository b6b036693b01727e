"""The fallbacks for machines whose kernels are not batch-invariant, and what notices such a machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.unit.model_configs import load, logits, prefill, random_tokens, small_dense
from workers.model.expert_dispatch import combine, dispatch
from workers.model.layers import Linear, silu
from workers.model.self_test import linears_are_invariant


class MoodyLinear(Linear):
    """A kernel as a machine might have it: other bits for other numbers of rows."""

    def _multiply(self, x_TI: Tensor) -> Tensor:
        return super()._multiply(x_TI) * (1 + 1e-6 * x_TI.shape[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_gives_a_row_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(70, 48, generator=generator).to(dtype)
    linear = Linear(torch.randn(20, 48, generator=generator).to(dtype))
    for tiled in (False, True):
        y_TO = linear(x_TI)
        torch.testing.assert_close(y_TO.float(), x_TI.float() @ linear_weight(linear).T, atol=0.2, rtol=0.02)
        for rows in (1, 2, 3, 5, 31, 33):
            assert torch.equal(linear(x_TI[:rows]), y_TO[:rows]), tiled
        linear.use_tiles()


def linear_weight(linear: Linear) -> Tensor:
    """The weight of a linear, read through it."""
    return linear(torch.eye(linear.num_inputs, dtype=linear.dtype)).float().T


def test_the_self_test_notices_a_moody_kernel_and_tiles_mend_it() -> None:
    linear = MoodyLinear(torch.randn(20, 48, generator=torch.Generator().manual_seed(0)))
    assert not linears_are_invariant([linear])
    linear.use_tiles()
    assert linears_are_invariant([linear])


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
