"""y = x W^T + b with weights laid out once for the device at hand.

On CPU the weight is repacked for oneDNN. Against `F.linear` (MKL) on one AVX-512 AMD core that is 1.5 to 2
times as fast at one row and 2.5 to 3 times at 8 to 32 rows, though each call costs some 20 microseconds more.
Eight rows then cost little more than one, which is what makes riding along cheap; and a row's
result does not depend on the number of rows beside it, save where that number is 1 in some shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]

# Number of rows that oneDNN is told to lay weights out for. Measured with 1, 8, 32 and 128 rows: the layout
# it chooses for 1 row is slower with every one of them.
_EXPECTED_ROWS = 32


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The projection x [n, in] -> [n, out] of weight [out, in] and bias [out], all of one dtype.

    `weight` may be dropped by the caller afterwards: the packed form is a copy. Rows of x may be strided.
    """
    if _can_pack(weight):
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


class PlainLinear:
    """torch's own kernel for the device."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """oneDNN on a repacked weight."""

    __slots__ = ("_bias", "_run", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        ops = torch.ops.mkldnn
        self._weight = ops._reorder_linear_weight(weight, _EXPECTED_ROWS)
        self._bias = bias
        self._run: Callable[..., Tensor] = ops._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x, self._weight, self._bias, "none", (), "")


def _can_pack(weight: Tensor) -> bool:
    ops = torch.ops.mkldnn
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not (hasattr(ops, "_linear_pointwise") and hasattr(ops, "_reorder_linear_weight")):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
