"""What the executor knows of requests: their tokens, sampling and log probabilities; lane state by slot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from omniserve.model.sampling import Chooser
from omniserve.policy.plan import DeviceRows, LaneStart, NewToken
from omniserve.types import TokenLogprobs

PromptLogprobs = list[TokenLogprobs | None]


@dataclass(frozen=True, slots=True)
class ChosenToken(NewToken):
    """A new token with what was asked for about it; the first one of a request brings its prompt's."""

    logprobs: TokenLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(slots=True)
class Record:
    """Tokens of one request (prompt, then generated) and how to choose the next one.

    num_prompt_logprobs: likely tokens wanted at each prompt position (-1: all); None: none, or given.
    """

    request_id: int
    tokens: list[int]
    num_prompt: int
    max_tokens: int
    chooser: Chooser
    stop_ids: frozenset[int]
    num_prompt_logprobs: int | None = None
    prompt_logprobs: PromptLogprobs = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    def prompt_targets(self, rows: DeviceRows) -> list[int]:
        """Prompt tokens whose log probabilities these rows' logits give: those at start + 1 and on.

        Empty when they are not asked for, or were given before a drop. Nothing comes for a token whose KV was
        not computed: a request that asks must not take its prompt's KV from a cache.
        """
        if self.num_prompt_logprobs is None:
            return []
        return self.tokens[rows.start + 1 : min(rows.start + rows.num_tokens + 1, self.num_prompt)]

    def note_prompt(self, start: int, logprobs: list[TokenLogprobs]) -> None:
        """Log probabilities of the prompt tokens at start + 1 and on; after a drop they come again."""
        del self.prompt_logprobs[start + 1 :]
        self.prompt_logprobs += [*([None] if start == 0 and not self.prompt_logprobs else []), *logprobs]

    def append(self, token_id: int, by_lane: bool, logprobs: TokenLogprobs | None = None) -> ChosenToken:
        """Take in a chosen token; says whether it was the last one."""
        self.tokens.append(token_id)
        if self.chooser.rules is not None:
            self.chooser.rules.push(token_id)
        reason: Literal["stop", "length"] | None = None
        if token_id in self.stop_ids:
            reason = "stop"
        elif self.num_generated >= self.max_tokens:
            reason = "length"
        prompt_logprobs = None
        if self.num_prompt_logprobs is not None:
            prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs or [None], []
            self.num_prompt_logprobs = None
        return ChosenToken(self.request_id, token_id, by_lane, reason, logprobs, prompt_logprobs)


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
    """What the executor counts; seconds are wall-clock.

    swap_out_bytes, swap_in_bytes: KV in the device's type whose copy to (from) the host was started.
    """

    walks: int = 0
    lane_passes: int = 0
    device_tokens: int = 0
    prompt_tokens: int = 0
    lane_tokens: int = 0
    device_wait_s: float = 0.0
    starved_s: float = 0.0
    walk_s: float = 0.0
    pass_s: float = 0.0
    swap_out_bytes: int = 0
    swap_in_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """Rows of one layer of one walk: requests with device rows, and lanes that entered after attention."""

    walk: int
    layer: int
    device_requests: tuple[int, ...]
    lane_requests: tuple[int, ...]
