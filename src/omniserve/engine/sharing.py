"""What best-effort work had of the engine, and what latency-sensitive work paid for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from omniserve.policy.latency import Prediction, WalkLoad
from omniserve.policy.latency_model import load_of
from omniserve.policy.plan import DeviceRows, Step


def paid_s(
    model: Prediction, step: Step, load: WalkLoad, host_is_busy: float, chats: Sequence[DeviceRows]
) -> float:
    """Seconds by which a walk is longer, by the model, than its latency-sensitive rows alone would make it.

    load: of the whole walk as it ran, beside a host that streamed for `host_is_busy` of the time.
    chats: those of its rows that are latency-sensitive; alone they would have no lanes, no copies and an idle
    host beside them. A walk without any costs no chat anything.
    """
    is_shared = load.lane_rows or load.copied_tokens or host_is_busy or len(chats) < len(step.rows)
    if not chats or not is_shared:
        return 0.0
    alone = load_of(replace(step, rows=tuple(chats), copies_out=()))
    return max(0.0, model.walk_s(load, host_is_busy) - model.walk_s(alone, 0.0))


@dataclass(slots=True)
class Sharing:
    """Totals. Best-effort tokens by where their attention was computed; seconds that chats paid."""

    lane_tokens: int = 0
    device_tokens: int = 0
    paid_s: float = 0.0

    def note_token(self, by_lane: bool) -> None:
        """A best-effort token."""
        if by_lane:
            self.lane_tokens += 1
        else:
            self.device_tokens += 1
