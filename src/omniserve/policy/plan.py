"""Plain data between the scheduler, the state and the executor. Integers and seconds only.

schedule() decides a Plan: counts and request ids. State.commit() turns it into a Step: page ids, slots,
copies. The executor carries a Step out and answers with a StepResult, which State.apply() takes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omniserve.policy.explanation import Explanation

# ---------------------------------------------------------------- decisions


@dataclass(frozen=True, slots=True)
class Drop:
    """Give up all KV of a request; it waits at its old place and recomputes prompt and generated tokens."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Displace:
    """A request that decodes on the device starts to move to the host; its clean pages are free at once."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Reserve:
    """Device pages for a request: its whole remaining prompt, or its next decode token.

    cached: pages that hold the beginning of its prompt already; `num_pages` come in addition. keep: protected
    cached pages that stay.
    """

    request_id: int
    num_pages: int
    cached: tuple[int, ...] = ()
    keep: int = 0


@dataclass(frozen=True, slots=True)
class GrowHost:
    """Host pages for the next token of a lane."""

    request_id: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class ShareHost:
    """The host has the next full pages of a request already: they are referenced, not copied."""

    request_id: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CopyOut:
    """Copy `num_tokens` tokens from `start`, of one page, from the device to the host."""

    request_id: int
    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Unmirror:
    """Give back the host pages of a request that decodes on the device."""

    request_id: int


@dataclass(frozen=True, slots=True)
class SwapIn:
    """Reserve device pages for a lane that shall return to the device; it decodes on meanwhile.

    cached, keep: as for Reserve; what cached pages hold need not be fetched.
    """

    request_id: int
    num_pages: int
    cached: tuple[int, ...] = ()
    keep: int = 0


@dataclass(frozen=True, slots=True)
class CopyIn:
    """Copy `num_tokens` tokens from `start` (a page start) from the host to the reserved device pages."""

    request_id: int
    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class CancelSwapIn:
    """Give the reserved device pages of a returning lane back; it stays a lane."""

    request_id: int


@dataclass(frozen=True, slots=True)
class StopLane:
    """A returning lane pauses at its token boundary so that its tail can follow."""

    request_id: int


Move = (
    Drop
    | Displace
    | Reserve
    | GrowHost
    | ShareHost
    | CopyOut
    | Unmirror
    | SwapIn
    | CopyIn
    | CancelSwapIn
    | StopLane
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """`num_tokens` tokens of a prefill from position `start`."""

    request_id: int
    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The frozen decision of one scheduler step.

    kind      "walk": device rows are present; "passes": lanes only, for at most `budget_s` seconds.
    moves     changes of residence, in the order in which they are applied.
    decodes   requests with one decode row on the device.
    lane_starts
              lanes that start their next token.
    lane_cap  lane rows that may enter at each layer.
    why       what the plan was made by; None where it is made by constants.
    best_effort_debt_s
              what the guaranteed share of best-effort work still owes it after this plan.
    """

    kind: Literal["walk", "passes"]
    moves: tuple[Move, ...] = ()
    decodes: tuple[int, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    lane_starts: tuple[int, ...] = ()
    lane_cap: tuple[int, ...] = ()
    budget_s: float = 0.0
    why: Explanation | None = None
    best_effort_debt_s: float = 0.0

    @property
    def is_empty(self) -> bool:
        return not (self.moves or self.decodes or self.chunks or self.lane_starts)


# ---------------------------------------------------------------- orders


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """Rows of one request in a walk: tokens start..start+num_tokens-1, KV in `pages`.

    `samples` is set when the last row's logits choose the next token, `is_prefill` for rows of a chunk.
    """

    request_id: int
    start: int
    num_tokens: int
    samples: bool
    is_prefill: bool
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LaneStart:
    """A lane starts the token at `position`; `new_pages` are its host pages from index `first_page` on."""

    request_id: int
    slot: int
    position: int
    first_page: int
    new_pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Part of a page between device and host: `num_tokens` tokens from `device_offset` of `device_page` on.

    On the host they start at token `host_offset` of the first of `host_pages`.
    """

    copy_id: int
    device_page: int
    device_offset: int
    num_tokens: int
    host_offset: int
    host_pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A plan with every id filled in: all the executor needs besides the requests' tokens."""

    kind: Literal["walk", "passes"]
    rows: tuple[DeviceRows, ...] = ()
    lane_starts: tuple[LaneStart, ...] = ()
    lane_cap: tuple[int, ...] = ()
    budget_s: float = 0.0
    cancel_slots: tuple[int, ...] = ()
    cancel_fetches: tuple[int, ...] = ()
    copies_out: tuple[PageCopy, ...] = ()
    copies_in: tuple[PageCopy, ...] = ()


# ---------------------------------------------------------------- results


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token chosen for a request; `finish_reason` is set on its last one."""

    request_id: int
    token_id: int
    by_lane: bool
    finish_reason: Literal["stop", "length"] | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step brought.

    staged           copies to the host that have left their device page.
    arrived          copies, either way, that have arrived.
    drained          cancelled slots whose task has acknowledged.
    lanes_unserved   lanes that were ready and stayed out because of a cap, at the end of a walk.
    lane_rows        lane rows that entered in a walk, over all layers.
    lanes_waiting    lane rows that wait at each layer at the end of the step, ready or not.
    """

    tokens: tuple[NewToken, ...] = ()
    staged: tuple[int, ...] = ()
    arrived: tuple[int, ...] = ()
    drained: tuple[int, ...] = ()
    lanes_unserved: int = 0
    lane_rows: int = 0
    lanes_waiting: tuple[int, ...] = ()
