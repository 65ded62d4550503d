"""What the executor knows of requests: their tokens and sampling, and lane state by slot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from omniserve.policy.plan import LaneStart, NewToken


@dataclass(slots=True)
class Record:
    """Tokens of one request (prompt, then generated) and how to choose the next one."""

    request_id: int
    tokens: list[int]
    num_prompt: int
    max_tokens: int
    temperature: float
    seed: int
    stop_ids: frozenset[int]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    def append(self, token_id: int, by_lane: bool) -> NewToken:
        """Take in a chosen token; says whether it was the last one."""
        self.tokens.append(token_id)
        reason: Literal["stop", "length"] | None = None
        if token_id in self.stop_ids:
            reason = "stop"
        elif self.num_generated >= self.max_tokens:
            reason = "length"
        return NewToken(self.request_id, token_id, by_lane, reason)


@dataclass(slots=True)
class LaneArrays:
    """Per-slot state of lanes: which request, where its token in flight sits, what that token is."""

    max_lanes: int
    request_ids: np.ndarray = field(init=False)
    positions: torch.Tensor = field(init=False)
    last_tokens: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.request_ids = np.full(self.max_lanes, -1, dtype=np.int64)
        self.positions = torch.zeros(self.max_lanes, dtype=torch.int64)
        self.last_tokens = torch.zeros(self.max_lanes, dtype=torch.int64)

    def start(self, start: LaneStart, last_token: int) -> None:
        self.request_ids[start.slot] = start.request_id
        self.positions[start.slot] = start.position
        self.last_tokens[start.slot] = last_token


@dataclass(slots=True)
class Counters:
    """What the executor counts; seconds are wall-clock."""

    walks: int = 0
    lane_passes: int = 0
    device_tokens: int = 0
    prompt_tokens: int = 0
    lane_tokens: int = 0
    device_wait_s: float = 0.0
    starved_s: float = 0.0
    walk_s: float = 0.0
    pass_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """Rows of one layer of one walk: requests with device rows, and lanes that entered after attention."""

    walk: int
    layer: int
    device_requests: tuple[int, ...]
    lane_requests: tuple[int, ...]
