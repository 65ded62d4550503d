"""Packed projections equal plain ones, and each row its own whatever rows are beside it."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import omniserve._native as _native
from omniserve.model.linear import DenseLinear, WeightDType, make_gated, make_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def instruction_sets() -> list[str]:
    """Those that this CPU has."""
    found = []
    for name in ("scalar", "avx2", "avx512", "avx512_bf16", "neon"):
        try:
            _native.set_simd(name)
        except ValueError:
            continue
        found.append(name)
    _native.set_simd("auto")
    return found


@pytest.fixture(params=instruction_sets())
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.set_simd(request.param)
    yield request.param
    _native.set_simd("auto")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept_values(weight: torch.Tensor, kept: WeightDType) -> torch.Tensor:
    """What a weight is worth once it is kept in another type, float64."""
    if kept == "int8":
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        return ((weight.float() / scale).round() * scale).double()
    return weight.to(getattr(torch, kept)).double()


def assert_close(y: torch.Tensor, exact: torch.Tensor, units: int = 10) -> None:
    unit = torch.finfo(y.dtype).eps * float(exact.abs().max())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=units * unit)


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 72), (33, 71), (31, 1100)], ids=str)
def test_a_product_equals_the_plain_one_with_the_weights_that_are_kept(
    simd: str, shape: tuple[int, int], dtype: torch.dtype, kept: WeightDType
) -> None:
    num_out, num_in = shape
    weight, bias = random(num_out, num_in).to(dtype), random(num_out, seed=1).to(dtype)
    linear = DenseLinear(weight, bias, _native.ThreadTeam(2), kept)
    for n in (1, 2, 3, 7, 13, 30):
        x = random(n, num_in + 9, seed=n).to(dtype)[:, 4 : num_in + 4]
        assert_close(linear(x), x.double() @ kept_values(weight, kept).T + bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gated_product_is_silu_of_one_times_the_other(simd: str, dtype: torch.dtype) -> None:
    gate, up = random(50, 72).to(dtype), random(50, 72, seed=1).to(dtype)
    biases = random(50, seed=2).to(dtype), random(50, seed=3).to(dtype)
    x = (4 * random(9, 72, seed=4)).to(dtype)  # far to both sides of zero
    expected = F.silu(F.linear(x.double(), gate.double(), biases[0].double()))
    expected *= F.linear(x.double(), up.double(), biases[1].double())
    assert_close(make_gated(gate, up, biases)(x), expected)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    num_in=st.integers(1, 1200),
    threads=st.integers(1, 3),
    kept=st.sampled_from(["float32", "bfloat16", "int8"]),
    dtype=st.sampled_from(DTYPES),
)
def test_a_row_is_bit_for_bit_the_same_beside_any_other_rows(
    n: int, num_in: int, threads: int, kept: WeightDType, dtype: torch.dtype
) -> None:
    weight, x = random(70, num_in).to(dtype), random(n, num_in, seed=1).to(dtype)
    together = DenseLinear(weight, None, _native.ThreadTeam(threads), kept)(x)
    alone = DenseLinear(weight, None, _native.ThreadTeam(1), kept)
    for row in range(n):
        assert torch.equal(alone(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_float32_weights_of_16_bits_take_16_bits_and_give_the_same_bits(
    simd: str, stored: torch.dtype
) -> None:
    weight, x, team = random(40, 1100).to(stored).float(), random(5, 1100, seed=1), _native.ThreadTeam(1)
    narrow, wide = DenseLinear(weight, None, team), DenseLinear(weight, None, team, "float32")
    assert narrow.num_bytes * 2 == wide.num_bytes
    assert torch.equal(narrow(x), wide(x))


def test_one_value_that_16_bits_do_not_hold_keeps_all_of_32() -> None:
    weight = random(40, 64).bfloat16().float()
    weight[39, 63] += 2**-20
    assert make_linear(weight).num_bytes == weight[:32].nbytes * 2  # two panels


def test_no_rows_give_no_rows() -> None:
    assert make_linear(random(8, 8))(torch.empty(0, 8)).shape == (0, 8)


def test_a_packed_weight_is_a_copy() -> None:
    weight = torch.ones(16, 16)
    linear = make_linear(weight)
    weight.zero_()
    assert torch.equal(linear(torch.ones(2, 16)), torch.full((2, 16), 16.0))


def test_int8_of_a_row_of_zeros_is_zero() -> None:
    assert torch.equal(make_linear(torch.zeros(3, 5), kept="int8")(torch.ones(1, 5)), torch.zeros(1, 3))


def test_a_gate_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="gate of shape"):
        make_gated(random(8, 8), random(9, 8))


def test_a_gate_that_16_bits_hold_gates_a_weight_that_needs_32() -> None:
    gate, up, x = random(40, 64).bfloat16().float(), random(40, 64, seed=1), random(3, 64, seed=2)
    expected = F.silu(F.linear(x.double(), gate.double())) * F.linear(x.double(), up.double())
    assert_close(make_gated(gate, up)(x), expected)
