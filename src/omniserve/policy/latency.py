"""What work is, in the terms in which its time is predicted, and what the policy asks of a prediction."""

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
    device reads so much KV for them, however few their rows; copied_tokens, KV that leaves the device before
    the walk.
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

    def copy(self) -> WalkLoad:
        """Written out: this runs many times a plan."""
        return WalkLoad(
            self.num_tokens,
            self.num_decodes,
            self.decode_context,
            self.prefill_load,
            self.num_samples,
            self.lane_rows,
            self.num_chunks,
            self.chunk_context,
            self.copied_tokens,
        )

    def add_decode(self, context: int) -> None:
        self.num_tokens += 1
        self.num_decodes += 1
        self.decode_context += context
        self.num_samples += 1

    def add_decodes(self, count: int, context: int) -> None:
        """So many of the same context."""
        self.num_tokens += count
        self.num_decodes += count
        self.decode_context += count * context
        self.num_samples += count

    def add_lane_rows(self, rows: int, num_layers: int) -> None:
        """Lane rows over all layers: of those that enter, one in `num_layers` is at the end of a token."""
        self.lane_rows += rows
        self.num_samples += -(-rows // num_layers)

    def add_chunk(self, start: int, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self.prefill_load += num_tokens * start + num_tokens * (num_tokens + 1) // 2
        self.num_chunks += 1
        self.chunk_context += start + num_tokens if start else 0

    def with_decode(self, context: int) -> WalkLoad:
        more = self.copy()
        more.add_decode(context)
        return more

    def with_lane_rows(self, rows: int, num_layers: int) -> WalkLoad:
        more = self.copy()
        more.add_lane_rows(rows, num_layers)
        return more

    def with_chunk(self, start: int, num_tokens: int, ends_prompt: bool) -> WalkLoad:
        more = self.copy()
        more.add_chunk(start, num_tokens)
        more.num_samples += ends_prompt
        return more


class Prediction(Protocol):
    """Seconds that work will take; never less for more of anything. `LatencyModel` is the real one.

    host_is_busy: share of the time in which host attention streams, 0 to 1.
    """

    @property
    def host_share(self) -> float:
        """That share in the last walks, as measured: what the next one can expect while there are lanes."""
        ...

    def walk_s(self, load: WalkLoad, host_is_busy: float) -> float:
        """A walk, expected."""
        ...

    def bound_s(self, load: WalkLoad, host_is_busy: float) -> float:
        """A walk, with the margin that its errors so far ask for."""
        ...

    def pass_s(self, num_rows: int, host_is_busy: float) -> float:
        """One pass of lanes without device rows."""
        ...

    def host_attention_s(self, kv_bytes: int) -> float:
        """Host attention over `kv_bytes` of one layer's KV."""
        ...

    def copy_s(self, num_bytes: int) -> float:
        """A copy between device and host."""
        ...


class LearningPrediction(Prediction, Protocol):
    """A prediction that every walk corrects."""

    def observe(
        self,
        load: WalkLoad,
        host_is_busy: float,
        seconds: float,
        planned: tuple[WalkLoad, float] | None = None,
    ) -> float:
        """Learn from a walk; returns what had been expected of it.

        planned: load and host_is_busy by which it was planned, where that was done by predictions.
        """
        ...

    def accuracy(self) -> dict[str, dict[str, float]]:
        """Of the last walks of each kind: count, mean and P90."""
        ...
