"""What a policy with targets works within, besides the state and its predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omniserve.types import ServiceClass

# Without latency-sensitive rows too, a walk takes at most this share of the tightest TTFT: an arrival never
# meets a long iteration.
WALK_BOUND_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Terms:
    """Constants of one engine.

    max_num_batched_tokens
                    device rows that the buffers of a walk hold.
    max_lane_rows   lane rows that may be in the batch at one layer.
    pass_budget_s   seconds of lane passes before the engine looks up again.
    walk_bound_s    longest walk with best-effort rows.
    kv_token_bytes  of one token's K and V at one layer, as the host stores them.
    best_effort_share
                    share of device time that best-effort work has even when that breaks targets.
    """

    max_num_batched_tokens: int
    max_lane_rows: int
    pass_budget_s: float
    walk_bound_s: float
    kv_token_bytes: int
    best_effort_share: float = 0.0


def walk_bound_s(classes: Sequence[ServiceClass]) -> float | None:
    """Seconds of the longest walk with best-effort rows; None when no class has targets."""
    targets = [slo.ttft_s for kind in classes for slo in (kind.slo, kind.tightest) if slo is not None]
    return WALK_BOUND_SHARE * min(targets) if targets else None
