"""Projections in 4 bits: how far from the weights, and how far from the product of the rounded weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omniserve.errors import ModelError
from omniserve.model.quantized_linear import GROUP_COLUMNS, Int4Linear


def weight_of(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random, with outputs of very different size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 1, rows)[torch.randperm(rows, generator=generator)]
    return torch.randn(rows, columns, generator=generator) * sizes[:, None]


def kept(linear: Int4Linear, columns: int) -> Tensor:
    """The weight [out, in] that a linear without bias holds, read through unit rows."""
    return linear(torch.eye(columns)).t().contiguous()


def activations(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Strided rows, some with one value a hundred times the others', as real models have them."""
    x = torch.randn(rows, columns + 9, generator=torch.Generator().manual_seed(rows))
    x[::2, columns // 2] *= 100
    return x.to(dtype)[:, 4 : 4 + columns]


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 96), (1040, 64)])
def test_int4_keeps_each_weight_to_half_a_step_of_its_group(rows: int, columns: int) -> None:
    """Besides, scale, zero and result are bfloat16; a group's ends are eight steps from its zero."""
    weight = weight_of(rows, columns) + 0.01
    groups = weight.unflatten(1, (-1, GROUP_COLUMNS))
    step = (groups.amax(dim=2, keepdim=True) - groups.amin(dim=2, keepdim=True)) / 15
    rounding = 2.0**-9 * (8 * step + 2 * groups.abs().amax(dim=2, keepdim=True))
    errors = (kept(Int4Linear(weight, None), columns).view_as(groups) - groups).abs()
    assert torch.all(errors <= step / 2 * 1.01 + rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 96), (304, 1536)])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 33])
def test_int4_multiplies_what_it_keeps_in_bfloat16(
    num_rows: int, rows: int, columns: int, has_bias: bool, dtype: torch.dtype
) -> None:
    """Rounding of the activation, of the result, and of the weight as it was read back."""
    weight = weight_of(rows, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if has_bias else None
    rounded = kept(Int4Linear(weight, None), columns).double()
    x = activations(num_rows, columns, dtype)
    y = Int4Linear(weight, bias)(x)
    assert y.dtype == dtype
    exact = x.double() @ rounded.t() + (0 if bias is None else bias.double())
    unit = torch.finfo(torch.bfloat16).eps / 2
    products = x.double().abs() @ rounded.abs().t()
    bias_size = 0.0 if bias is None else bias.double().abs()
    assert torch.all((y.double() - exact).abs() <= unit * (2.1 * products + 2 * exact.abs() + 2 * bias_size))


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    linear = Int4Linear(weight_of(64, 96), None)
    x = activations(40, 96, torch.float32)
    together = linear(x)
    for first, last in ((0, 1), (3, 5), (7, 24)):
        assert torch.equal(linear(x[first:last]), together[first:last])


def test_zeros_stay_zeros() -> None:
    weight = weight_of(32, 32)
    weight[3] = 0
    x = activations(3, 32, torch.float32).clone()
    x[1] = 0
    y = Int4Linear(weight, None)(x)
    assert torch.all(y[1] == 0)
    assert torch.all(y[:, 3] == 0)
    assert torch.all(y[0, 4:] != 0)


def test_the_given_weight_is_left_alone() -> None:
    weight = weight_of(32, 32)
    Int4Linear(weight, None)
    assert torch.equal(weight, weight_of(32, 32))


def test_the_weight_shrinks_to_five_bits() -> None:
    """Four, and a scale and a zero of 16 bits for every 32."""
    weight = weight_of(256, 1024)
    assert Int4Linear(weight, None).num_bytes == weight.nbytes * 5 // 32


@pytest.mark.parametrize(("rows", "columns"), [(17, 32), (16, 33)])
def test_int4_refuses_other_shapes_and_says_what_to_use(rows: int, columns: int) -> None:
    with pytest.raises(ModelError, match=f"has one of {rows} and {columns}; use 'int8'"):
        Int4Linear(weight_of(rows, columns), None)
