"""Packed projections equal plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omniserve.model.linear import PackedLinear, PlainLinear, make_linear

CAN_PACK = isinstance(make_linear(torch.zeros(8, 8)), PackedLinear)


@pytest.mark.skipif(not CAN_PACK, reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 33, 300])
def test_packed_equals_plain(dtype: torch.dtype, has_bias: bool, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 72, generator=generator).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype) if has_bias else None
    x = torch.randn(num_rows, 100, generator=generator).to(dtype)[:, 5:77]
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    unit = torch.finfo(dtype).eps * float(exact.abs().max())
    for linear in (PackedLinear(weight, bias), PlainLinear(weight, bias)):
        y = linear(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=10 * unit)


@pytest.mark.skipif(not CAN_PACK, reason="this build of torch has no oneDNN")
def test_a_packed_weight_is_a_copy() -> None:
    weight = torch.ones(16, 16)
    linear = make_linear(weight)
    weight.zero_()
    assert torch.equal(linear(torch.ones(2, 16)), torch.full((2, 16), 16.0))


def test_types_without_a_packed_kernel_run_plainly() -> None:
    linear = make_linear(torch.ones(4, 4, dtype=torch.float64))
    assert isinstance(linear, PlainLinear)
    assert torch.equal(linear(torch.ones(1, 4, dtype=torch.float64)), torch.full((1, 4), 4.0).double())
