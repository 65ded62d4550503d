"""y = x W^T + b with the weight rounded to 4 bits, multiplied by torch's own operator: lossy, off by default.

(8 bits are the native kernel's affair: linear.py, `kept`.) Why this operator: docs/models.md, "Quantisation".
"""

from __future__ import annotations

import torch
from torch import Tensor

from omniserve.errors import ModelError

# Inputs that share a scale and a zero point. The finest that torch takes.
GROUP_COLUMNS = 32
# What torch's layout asks of the number of outputs.
_BLOCK_ROWS = 16
# Rows that are rounded at once, so that a large tensor is not in memory twice.
_ROUNDED_ROWS = 1024


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
        if num_rows % _BLOCK_ROWS or num_columns % GROUP_COLUMNS:
            raise ModelError(
                f"quantization: 'int4' takes matrices of a multiple of {_BLOCK_ROWS} outputs and of"
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
        bias_bytes = 0 if self._bias is None else self._bias.nbytes
        return self._weight.nbytes + self._scales_and_zeros.nbytes + bias_bytes

    def __call__(self, x: Tensor) -> Tensor:
        narrow = x.to(torch.bfloat16).contiguous()
        y: Tensor = self._run(narrow, self._weight, GROUP_COLUMNS, self._scales_and_zeros).to(x.dtype)
        return y if self._bias is None else y.add_(self._bias)
