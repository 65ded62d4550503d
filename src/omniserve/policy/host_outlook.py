"""HostOutlook: the host and its lanes as one plan sees them. How busy it is, what lanes will bring, and how
much more it would take. docs/policy.md, "Division of slack" and "Placement".
"""

from __future__ import annotations

import math

from omniserve.policy.latency import Prediction
from omniserve.policy.request import Phase, Request
from omniserve.policy.state import State
from omniserve.policy.terms import Terms


class HostOutlook:
    """Asked with the length of a walk, in seconds, where the answer depends on it.

    busy: share of the next walk in which the host will stream; without lanes, none. row_s: host seconds of
    one of the lanes' rows at one layer, on average.
    """

    def __init__(self, state: State, model: Prediction, terms: Terms) -> None:
        self.state, self.model, self.terms = state, model, terms
        lanes = state.in_phase(Phase.LANE)
        self.num_lanes, self.row_s = len(lanes), 0.0
        self.busy = model.host_share if lanes else 0.0
        self.is_usable = state.host_ready and not state.host_failed
        if lanes:
            mean_tokens = sum([r.kv_tokens for r in lanes]) // len(lanes)
            self.row_s = model.host_attention_s(mean_tokens * terms.kv_token_bytes)

    # ------------------------------------------------------------ what lanes will bring

    def expected_rows(self) -> int:
        """Over all layers of a walk: one of each lane, or as many as lately came. A lane whose results are
        fast has a row at many layers of one walk."""
        if not self.is_usable or not self.num_lanes:
            return 0
        expected = max(self.num_lanes, math.ceil(self.state.lane_rows_per_walk))
        return min(self.terms.max_lane_rows * (self.state.limits.num_layers + 1), expected)

    def decoded_per_walk(self) -> float:
        """Best-effort tokens that those who decode, or are about to, can be expected to bring in a walk: one
        each on the device, of lanes as many as their rows make."""
        on_device = (Phase.PREFILL, Phase.DEVICE, Phase.MOVING_OUT, Phase.MOVING_IN)
        count = sum(1 for phase in on_device for _ in self.state.in_class(phase, best_effort=True))
        return count + self.expected_rows() / self.state.limits.num_layers

    # ------------------------------------------------------------ room for more

    def wanted_share(self, walk_s: float) -> float:
        """Share of the time in which the host would stream if every lane had one row a walk."""
        return min(1.0, self.num_lanes * self.row_s / walk_s) if walk_s > 0 and self.num_lanes else 0.0

    def free_bandwidth(self, walk_s: float) -> float:
        """Of the host's time, what lanes leave: those that ask for one row a walk, and as lately measured,
        for a lane may have many."""
        return 1.0 - max(self.busy, self.wanted_share(walk_s))

    def gains(self, walk_s: float) -> bool:
        """Whether another lane would yield tokens."""
        return self.is_usable and self.free_bandwidth(walk_s) > 0.0

    def free_share(self, walk_s: float) -> float:
        """Of the capacity to decode more best-effort texts: the freer of the sides where they may decode."""
        limits, state = self.state.limits, self.state
        device = max(0, state.device.num_free - limits.watermark_pages) / limits.num_device_pages
        if not self.is_usable:
            return device
        slots = len(state.free_slots) / limits.max_lanes
        pages = state.host.num_free / limits.num_host_pages
        host = min(slots, pages, self.free_bandwidth(walk_s))
        return host if limits.host_offload == "always" else max(device, host)

    def move_s(self, request: Request, walk_s: float) -> float:
        """What becoming a lane costs a request: the copy of its KV, and a token at one walk a layer."""
        num_layers = self.state.limits.num_layers
        copy_s = self.model.copy_s(request.kv_tokens * self.terms.kv_token_bytes * num_layers)
        return copy_s + num_layers * max(walk_s, self.row_s)
