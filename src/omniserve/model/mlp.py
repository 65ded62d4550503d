"""What a layer does to its rows after attention: a gated MLP, or a few out of many of them.

Both take normalised rows [n, H] and return new memory [n, H]; with shards, this shard's part of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from omniserve.model.linear import Linear

Mlp = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """down(silu(gate(x)) * up(x))."""

    gate_up: Linear  # H -> this shard's intermediate size: silu(gate) * up
    down: Linear  # that -> H

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.gate_up(x))


@dataclass(frozen=True, slots=True)
class ExpertsMlp:
    """Each row goes through the `per_token` experts that the router likes best, weighted by its softmax.

    Rows are sorted by expert, so that an expert that anybody chose runs once, over all of its rows.
    """

    router: Linear  # H -> number of experts
    experts: list[GatedMlp]
    per_token: int
    is_normalised: bool

    def __call__(self, x: Tensor) -> Tensor:
        weights, chosen = self._route(x)
        by_expert = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        rows = by_expert // self.per_token
        inputs, weights = x[rows], weights.flatten()[by_expert, None]
        total = torch.zeros_like(x)
        first = 0
        for expert, count in zip(self.experts, counts, strict=True):
            if not count:
                continue
            part = slice(first, first + count)
            weighted = expert(inputs[part]) * weights[part]
            total.index_add_(0, rows[part], weighted.to(x.dtype))
            first += count
        return total

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [n, per_token] float32 and numbers of the experts of each row."""
        probabilities = self.router(x).softmax(dim=-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.per_token, dim=-1)
        if self.is_normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, chosen
