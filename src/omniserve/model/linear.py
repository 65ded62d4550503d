"""y = x W^T + b by the project's own kernel (csrc/dense.h), with weights laid out once.

A few rows cost little more than one, which is what makes riding along cheap, and a row's result is the same
whatever rows are beside it.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import omniserve._native as _native
from omniserve.dtypes import FloatName, dtype_name


class Linear(Protocol):
    """A projection; `num_bytes` is the memory of its weight and bias."""

    @property
    def num_bytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor: ...


# How a weight may be kept: as it comes, or in another type, with rows and sums as they were.
WeightDType = FloatName | Literal["int8"]
# Rows of a weight that are looked at together.
_ROWS_LOOKED_AT = 64


def make_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    team: _native.ThreadTeam | None = None,
    kept: WeightDType | None = None,
) -> DenseLinear:
    """The projection x [n, in] -> [n, out] of weight [out, in] and bias [out], all of one dtype.

    team: threads, the caller among them; None: the caller alone. kept: see DenseLinear. `weight` may be
    dropped by the caller afterwards: the packed form is a copy. Rows of x may be strided.
    """
    return DenseLinear(weight, bias, team or _native.ThreadTeam(1), kept)


def make_gated(
    gate: Tensor,
    up: Tensor,
    biases: tuple[Tensor, Tensor] | None = None,
    team: _native.ThreadTeam | None = None,
    kept: WeightDType | None = None,
) -> DenseGated:
    """silu(x gate^T) * (x up^T), each product with its bias: [n, in] -> [n, out]. See make_linear."""
    gate_bias, up_bias = biases or (None, None)
    if kept is None:  # one type for both
        types = narrowest(gate), narrowest(up)
        kept = types[0] if types[0] == types[1] else dtype_name(up.dtype)
    team = team or _native.ThreadTeam(1)
    return DenseGated(DenseLinear(gate, gate_bias, team, kept), DenseLinear(up, up_bias, team, kept))


def narrowest(weight: Tensor) -> WeightDType:
    """The type of fewest bytes that holds every value: most checkpoints are bfloat16 in truth."""
    if weight.dtype == torch.float32:
        if _holds(torch.bfloat16, weight):
            return "bfloat16"
        if _holds(torch.float16, weight):
            return "float16"
    return dtype_name(weight.dtype)


def _holds(dtype: torch.dtype, weight: Tensor) -> bool:
    """A few rows at a time: the first ones tell of most matrices, and little memory is needed."""
    return all(torch.equal(part, part.to(dtype).float()) for part in torch.split(weight, _ROWS_LOOKED_AT))


class Gated:
    """silu(gate(x)) * up(x) of two projections of any kind."""

    __slots__ = ("_gate", "_up")

    def __init__(self, gate: Linear, up: Linear) -> None:
        self._gate = gate
        self._up = up

    @property
    def num_bytes(self) -> int:
        return self._gate.num_bytes + self._up.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        return F.silu(self._gate(x)).mul_(self._up(x))


class DenseLinear:
    """The native kernel on a packed weight. Sums are float32; rows and results have the type of `weight`.

    kept: the type the packed weight is stored in; None: the narrowest that loses nothing. One rounded to
    bfloat16 or int8 gives what plain arithmetic gives with the rounded weight.
    """

    __slots__ = ("_bias", "bias_addr", "dtype", "team", "weight")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        team: _native.ThreadTeam,
        kept: WeightDType | None = None,
    ) -> None:
        num_out, num_in = weight.shape
        self.dtype = dtype_name(weight.dtype)
        self.team = team
        self._bias = None if bias is None else bias.float().contiguous()
        self.bias_addr = 0 if self._bias is None else self._bias.data_ptr()
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        kept = kept or narrowest(weight)
        self.weight = _native.DenseWeight(
            weight.data_ptr(), self.dtype, weight.stride(0), num_out, num_in, kept
        )

    @property
    def num_bytes(self) -> int:
        return self.weight.bytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return _dense(x, self)


class DenseGated:
    """The native kernel on a gate's and a weight's panels in turn."""

    __slots__ = ("_gate", "_up")

    def __init__(self, gate: DenseLinear, up: DenseLinear) -> None:
        shapes = [(linear.weight.num_out, linear.weight.num_in) for linear in (gate, up)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"a gate of shape {shapes[0]} cannot gate one of shape {shapes[1]}")
        self._gate = gate
        self._up = up

    @property
    def num_bytes(self) -> int:
        return self._gate.num_bytes + self._up.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        return _dense(x, self._up, self._gate)


def _dense(x: Tensor, linear: DenseLinear, gate: DenseLinear | None = None) -> Tensor:
    n, num_out = x.shape[0], linear.weight.num_out
    assert x.shape[1] == linear.weight.num_in
    assert dtype_name(x.dtype) == linear.dtype
    y = torch.empty(n, num_out, dtype=x.dtype)
    _native.dense(
        linear.team,
        linear.weight,
        n,
        x.data_ptr(),
        x.stride(0),
        y.data_ptr(),
        num_out,
        linear.dtype,
        linear.bias_addr,
        None if gate is None else gate.weight,
        0 if gate is None else gate.bias_addr,
    )
    return y
