"""The seam between the scheduler and what work costs.

`CostModel` is all the scheduler asks. `FixedBudget` answers with constants: a token budget per walk and a
cap of lane rows per layer. A fitted latency model answers the same questions from the SLOs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class WalkLoad:
    """Device work gathered so far for one walk.

    num_tokens: query tokens n of the dense modules; num_decodes: g; decode_context: sum of l_j + 1 over
    decodes; prefill_load: sum over chunks of sum_{i=l+1..l+q} i (the paper's section 3.3.1).

    Beyond the paper: num_samples, rows whose logits are computed; lane_rows, lane rows that enter, summed
    over all layers; num_chunks; chunk_context, sum of l + q over chunks that do not begin their prompt: the
    device gathers so much KV for them; copied_tokens, KV that leaves the device before the walk.
    """

    num_tokens: int = 0
    num_decodes: int = 0
    decode_context: int = 0
    prefill_load: int = 0
    num_samples: int = 0
    lane_rows: int = 0
    num_chunks: int = 0
    chunk_context: int = 0
    copied_tokens: int = 0

    def add_decode(self, context: int) -> None:
        self.num_tokens += 1
        self.num_decodes += 1
        self.decode_context += context
        self.num_samples += 1

    def add_chunk(self, start: int, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self.prefill_load += num_tokens * start + num_tokens * (num_tokens + 1) // 2
        self.num_chunks += 1
        self.chunk_context += start + num_tokens if start else 0


class CostModel(Protocol):
    """What the scheduler asks about cost. Answers depend on the arguments alone."""

    def chunk_tokens(self, load: WalkLoad, start: int, remaining: int, best_effort: bool) -> int:
        """Most prompt tokens (0..remaining) from position `start` that the walk can still take."""
        ...

    def fits_decode(self, load: WalkLoad, context: int, best_effort: bool) -> bool:
        """Whether one more decode row with `context` tokens can ride."""
        ...

    def lane_cap(self, load: WalkLoad, num_layers: int) -> tuple[int, ...]:
        """Lane rows that may enter at each layer of the walk; what a layer leaves carries over."""
        ...

    def pass_budget_s(self) -> float:
        """Seconds that lane passes may run before the engine looks up again."""
        ...


@dataclass(frozen=True, slots=True)
class FixedBudget:
    """Constants instead of a model: `max_num_batched_tokens` and `max_lane_rows`. Promises no SLO."""

    max_num_batched_tokens: int
    max_lane_rows: int
    pass_budget_seconds: float = 0.05

    def chunk_tokens(self, load: WalkLoad, start: int, remaining: int, best_effort: bool) -> int:
        return max(0, min(remaining, self.max_num_batched_tokens - load.num_tokens))

    def fits_decode(self, load: WalkLoad, context: int, best_effort: bool) -> bool:
        return load.num_tokens < self.max_num_batched_tokens

    def lane_cap(self, load: WalkLoad, num_layers: int) -> tuple[int, ...]:
        return (self.max_lane_rows,) * num_layers

    def pass_budget_s(self) -> float:
        return self.pass_budget_seconds
