"""One request as the policy sees it, what it holds on the host, and the sizes everything keeps to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from omniserve.types import SLO

# Who goes first: lower rank, then earlier due, then earlier arrival.
Order = tuple[int, int, float, int]
# A request without targets is due so long after its arrival that it neither pushes ahead nor waits for ever.
UNHURRIED_S = 60.0
BEST_EFFORT_WINDOW_S = 24 * 3600.0
# Who changed sides stays for so many tokens: a copy is to pay, and nobody goes to and fro.
MIN_STAY_TOKENS = 8


class Phase(StrEnum):
    """Where a request's KV lives and what may be done with it: the boxes of the drawing in state.py."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DEVICE = "device"
    MOVING_OUT = "moving_out"
    LANE = "lane"
    MOVING_IN = "moving_in"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes the policy works within. Pages, tokens and rows; frames are staging pages in flight.

    num_host_partitions: contiguous runs of host pages with workers of their own.
    host_kv_is_lossy: KV on the host is rounded, so that it never returns to the device.
    prefix_reserve_pages: cached device pages of LS requests that BE work does not evict.
    """

    num_layers: int
    num_device_pages: int
    num_host_pages: int
    page_size: int
    host_page_size: int
    watermark_pages: int
    max_num_seqs: int
    max_lanes: int
    max_lane_rows: int
    num_frames: int
    max_copies_per_step: int
    host_offload: Literal["auto", "always", "never"]
    num_host_partitions: int = 1
    host_kv_is_lossy: bool = False
    prefix_reserve_pages: int = 0


@dataclass(slots=True)
class HostHold:
    """What one request holds on the host.

    copied_tokens: prefix handed to copying, or found on the host. unstaged, unlanded, unfetched: copy id ->
    first token of copies that have not left the device page, not arrived on the host, not come back.
    in_flight: a row of the slot is between exit and the end of its token. known_pages: pages the executor has
    been told. num_registered: leading pages that the pool knows by their hash.
    """

    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    copied_tokens: int = 0
    unstaged: dict[int, int] = field(default_factory=dict)
    unlanded: dict[int, int] = field(default_factory=dict)
    unfetched: dict[int, int] = field(default_factory=dict)
    in_flight: bool = False
    known_pages: int = 0
    num_registered: int = 0

    @property
    def landed_tokens(self) -> int:
        return min(self.unlanded.values(), default=self.copied_tokens)

    @property
    def staged_tokens(self) -> int:
        return min(self.unstaged.values(), default=self.copied_tokens)

    @property
    def is_busy(self) -> bool:
        """Host work still touches the pages or the slot."""
        return bool(self.unlanded or self.unfetched or self.in_flight)


@dataclass(slots=True)
class Request:
    """One request as the policy sees it. `id` is its arrival number; it never changes.

    device_pages: pages from index `num_released` on (a request moving out gives up leading pages first).
    incoming_pages: device pages reserved for a lane that comes back; fetched_tokens: prefix asked for.
    device_hashes, host_hashes: of its full pages, as far as its tokens are known, for either page size; none
    without a prefix cache. num_cached_tokens: tokens found on the device when it first started; None before.
    slo: its own targets, those of its class or none. arrival_s, deadline_s (of a best-effort job), started_s
    (its prefill, the last time before its first token), first_token_s, last_token_s: seconds on the engine's
    clock. moved_at: its num_tokens when it last changed sides; None before. priority: within its rank, lower
    goes first. due_s: when its first token is due, or its job; `order` follows from it.
    """

    id: int
    rank: int
    best_effort: bool
    num_prompt: int
    max_tokens: int
    num_tokens: int
    kv_tokens: int = 0
    phase: Phase = Phase.WAITING
    device_pages: list[int] = field(default_factory=list)
    num_released: int = 0
    host: HostHold | None = None
    incoming_pages: list[int] = field(default_factory=list)
    fetched_tokens: int = 0
    device_hashes: list[bytes] = field(default_factory=list)
    host_hashes: list[bytes] = field(default_factory=list)
    num_cached_tokens: int | None = None
    service_class: str = ""
    slo: SLO | None = None
    arrival_s: float = 0.0
    deadline_s: float | None = None
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    moved_at: int | None = None
    priority: int = 0
    order: Order = field(init=False, compare=False)

    def __post_init__(self) -> None:
        self.order = (self.rank, self.priority, self._due_s(), self.id)

    def _due_s(self) -> float:
        if self.slo is not None:
            return self.arrival_s + self.slo.ttft_s
        if self.deadline_s is not None:
            return self.deadline_s
        return self.arrival_s + (BEST_EFFORT_WINDOW_S if self.best_effort else UNHURRIED_S)

    @property
    def due_s(self) -> float:
        return self.order[2]

    @property
    def num_out(self) -> int:
        """Tokens generated so far."""
        return self.num_tokens - self.num_prompt

    @property
    def has_just_moved(self) -> bool:
        """Whether it changed sides so lately that the next to move should not be it: one that comes and goes
        pays for copies and makes no tokens."""
        return self.moved_at is not None and self.num_tokens - self.moved_at < MIN_STAY_TOKENS

    @property
    def hold(self) -> HostHold:
        assert self.host is not None, f"request {self.id} holds nothing on the host"
        return self.host


def requests_worse_than(requests: Iterable[Request], other: Request) -> list[Request]:
    """Those that must give way to `other`: behind it in line; the last in line first."""
    worse = [r for r in requests if r.order > other.order]
    return sorted(worse, key=lambda r: r.order, reverse=True)
