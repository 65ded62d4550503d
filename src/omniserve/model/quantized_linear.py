"""y = x W^T + b with the weight rounded to 8 or 4 bits: weight-only quantisation, lossy, off by default.

The products are torch's own: of what torch 2.13 and torchao 0.18 offer, the two calls that were fastest on a
CPU with AVX-512 VNNI and whose rows do not depend on the rows beside them (docs/models.md, "Quantisation").
torchao brings no kernel for x86: its weight-only tensors call torch's operators too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from omniserve.config import Quantization
from omniserve.errors import ConfigError, ModelError

# Columns that share a scale and a zero point in int4. The finest that torch takes.
GROUP_COLUMNS = 32
# What torch's int4 layout asks of the number of rows.
_INT4_ROWS = 16
# Rows that are rounded at once, so that a large tensor is not in memory twice.
_ROUNDED_ROWS = 1024


def check_quantization(quantization: Quantization, device: torch.device) -> None:
    """Raise ConfigError where this machine cannot do it; "none" it always can."""
    if quantization == "none":
        return
    if device.type != "cpu":
        raise ConfigError(f"quantization: {quantization!r} runs on the cpu device, not on {device.type}")
    # int4 needs it too: its output matrix is int8.
    if not _integer_products_are_exact():
        raise ConfigError(
            f"quantization: {quantization!r} needs exact 8-bit products (on x86: AVX-512 VNNI), which torch"
            " does not have on this machine; use 'none'"
        )


class Int8Linear:
    """A weight in int8 with a float32 scale for each output.

    oneDNN multiplies bytes only, so a row of x becomes two rows of bytes: x = scale (high + low / 254), scale
    being the row's largest absolute value / 127. Together they hold x to 2^-16 of that value: what is lost is
    the weight's rounding. Sums are int32, exact below 66,000 columns, so no row depends on the others.
    """

    __slots__ = ("_bias", "_run", "_scales", "_weight", "_zeros")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in] and bias [out] of any floating dtype; both may be dropped afterwards."""
        rounded = torch.empty(weight.shape, dtype=torch.int8)
        scales = torch.empty(weight.shape[0])
        for first in range(0, weight.shape[0], _ROUNDED_ROWS):
            rows = slice(first, first + _ROUNDED_ROWS)
            wide = weight[rows].float()
            scales[rows] = wide.abs().amax(dim=1).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
            rounded[rows] = (wide / scales[rows, None]).round_().to(torch.int8)
        self._scales = scales
        self._zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
        self._bias = bias
        self._weight: Tensor = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._run: Callable[..., Tensor] = torch.ops.onednn.qlinear_pointwise.default

    @property
    def num_bytes(self) -> int:
        """Of weight and bias."""
        return _bytes_of(self._weight, self._scales, self._zeros, self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        scale = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
        scale.div_(127).clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros
        terms = torch.empty((2 * num_rows, x.shape[1]))
        high, low = terms[:num_rows], terms[num_rows:]
        torch.div(x, scale, out=low)
        torch.round(low, out=high)
        low.sub_(high).mul_(254).round_()
        # Bytes without a sign, 128 being zero: the form that VNNI multiplies.
        unsigned = terms.add_(128).to(torch.uint8)
        sums = self._run(
            unsigned, 1.0, 128, self._weight, self._scales, self._zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        y = sums[num_rows:].div_(254).add_(sums[:num_rows]).mul_(scale)
        if self._bias is not None:
            y.add_(self._bias)
        return y.to(x.dtype)


class Int4Linear:
    """A weight in 4 bits, (q - 8) scale + zero, with a bfloat16 scale and zero for each group of columns.

    Activations are rounded to bfloat16 on the way in and out: with float32 ones torch's operator is many
    times slower than float32 weights.
    """

    __slots__ = ("_bias", "_run", "_scales_and_zeros", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in] and bias [out] of any floating dtype; both may be dropped afterwards.

        Raises ModelError when `out` is no multiple of 16 or `in` none of 32.
        """
        num_rows, num_columns = weight.shape
        if num_rows % _INT4_ROWS or num_columns % GROUP_COLUMNS:
            raise ModelError(
                f"quantization: 'int4' takes matrices of a multiple of {_INT4_ROWS} outputs and of"
                f" {GROUP_COLUMNS} inputs, and this model has one of {num_rows} and {num_columns}; use 'int8'"
            )
        rounded = torch.empty(weight.shape, dtype=torch.int32)
        groups = num_columns // GROUP_COLUMNS
        self._scales_and_zeros = torch.empty((groups, num_rows, 2), dtype=torch.bfloat16)
        for first in range(0, num_rows, _ROUNDED_ROWS):
            rows = slice(first, first + _ROUNDED_ROWS)
            wide = weight[rows].float().view(-1, groups, GROUP_COLUMNS)
            low, high = wide.aminmax(dim=2)
            scale = ((high - low) / 15).bfloat16()
            zero = ((low + high + scale) / 2).bfloat16()  # the sixteen steps lie around the middle
            scale[scale == 0] = 1  # equal weights: the zero point alone holds them
            steps = (wide - zero[..., None]).div_(scale[..., None]).round_().add_(8).clamp_(0, 15)
            rounded[rows] = steps.flatten(1).to(torch.int32)
            self._scales_and_zeros[:, rows] = torch.stack((scale, zero), dim=-1).transpose(0, 1)
        self._weight: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rounded, 1)
        self._bias = bias
        self._run = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    @property
    def num_bytes(self) -> int:
        """Of weight and bias."""
        return _bytes_of(self._weight, self._scales_and_zeros, self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        narrow = x.to(torch.bfloat16).contiguous()
        y: Tensor = self._run(narrow, self._weight, GROUP_COLUMNS, self._scales_and_zeros).to(x.dtype)
        return y if self._bias is None else y.add_(self._bias)


def _bytes_of(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@cache
def _integer_products_are_exact() -> bool:
    """Whether sums of byte products are exact: without VNNI, oneDNN adds two of them in 16 bits, which
    saturate. Asked of the operator itself, with the largest bytes there are."""
    ops = torch.ops.onednn
    if not (hasattr(ops, "qlinear_prepack") and hasattr(ops, "qlinear_pointwise")):
        return False
    num_columns = 64
    weight = torch.full((16, num_columns), 127, dtype=torch.int8)
    linear = ops.qlinear_prepack(weight, None)
    x = torch.full((2, num_columns), 255, dtype=torch.uint8)
    ones, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    y = ops.qlinear_pointwise.default(
        x, 1.0, 0, linear, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((y == 255 * 127 * num_columns).all())
