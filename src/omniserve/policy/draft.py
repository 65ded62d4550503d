"""Draft: a plan in the making. Rows, lane starts and the Room they take; each addition asks the budget
first."""

from __future__ import annotations

from omniserve.policy.budget import LaneShare, Policy
from omniserve.policy.explanation import LeftOut, Reason
from omniserve.policy.latency import WalkLoad
from omniserve.policy.plan import Chunk, Plan
from omniserve.policy.request import Order, Phase, Request
from omniserve.policy.residence import Room
from omniserve.policy.state import State

# Requests of which a plan says why they have no row.
MAX_LEFT_OUT = 16


class Draft:
    """What is decided so far, and the primitive decisions."""

    def __init__(self, state: State, now: float, policy: Policy) -> None:
        self.state = state
        self.limits = state.limits
        self.rules = policy.rules
        self.budget = policy.begin(state, now)
        self.room = Room(state)
        self.load = WalkLoad()
        self.decodes: list[int] = []
        self.chunks: list[Chunk] = []
        self.lane_starts: list[int] = []
        self.lane_share: LaneShare | None = None
        self.left_out: list[LeftOut] = []
        self.has_best_effort_rows = False
        self.oldest_best_effort = self._oldest_best_effort()

    def _oldest_best_effort(self) -> Order | None:
        """Its place in line: this request is never a victim of another best-effort one."""
        firsts = (self.state.first_best_effort(phase) for phase in Phase)
        return min((r.order for r in firsts if r is not None), default=None)

    @property
    def is_walk(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def is_empty(self) -> bool:
        return not (self.is_walk or self.lane_starts or self.room.moves)

    @property
    def rows_left(self) -> int:
        return self.limits.max_num_seqs - len(self.decodes) - len(self.chunks)

    def leave_out(self, request: Request, reason: Reason) -> None:
        if len(self.left_out) < MAX_LEFT_OUT:
            self.left_out.append(LeftOut(request.id, reason))

    def frozen(self) -> Plan:
        lanes = self.lane_share or LaneShare(0, (0,) * self.limits.num_layers)
        why, debt = self.budget.close(
            self.load, lanes if self.is_walk else None, self.has_best_effort_rows, self.left_out
        )
        return Plan(
            kind="walk" if self.is_walk else "passes",
            moves=tuple(self.room.moves),
            decodes=tuple(self.decodes),
            chunks=tuple(self.chunks),
            lane_starts=tuple(self.lane_starts),
            lane_cap=lanes.caps,
            budget_s=0.0 if self.is_walk else self.budget.pass_budget_s(),
            why=why,
            best_effort_debt_s=debt,
        )

    # ------------------------------------------------------------ decode rows

    def fits_decode(self, request: Request) -> bool:
        return self.rows_left > 0 and self.budget.fits_decode(
            self.load, request.kv_tokens + 1, request.best_effort
        )

    def decode(self, request: Request, only_best_effort: bool) -> bool:
        """Add a decode row; its next page may cost those behind it in line their place."""
        need = self.room.pages_missing(request, request.kv_tokens + 1)
        if not self.room.make_room(need, request, only_best_effort):
            self.leave_out(request, "pages")
            return False
        if need:
            self.room.reserve(request, need)
        self.decodes.append(request.id)
        self._note_row(request)
        self.load.add_decode(request.kv_tokens + 1)
        return True

    def _note_row(self, request: Request) -> None:
        self.room.scheduled.add(request.id)
        self.has_best_effort_rows |= request.best_effort

    # ------------------------------------------------------------ chunked prefill

    def prefill(self, request: Request) -> bool:
        """A chunk for a request, which starts if it has not; False when it cannot start."""
        if request.phase is Phase.WAITING:
            first_chunk = self._start(request)
            if first_chunk is None:
                return False
            start, count = first_chunk
        else:
            start = request.kv_tokens
            count = self._next_chunk(request, start) if self.rows_left > 0 else 0
        if count:
            self.chunks.append(Chunk(request.id, start, count))
            self._note_row(request)
            self.load.add_chunk(start, count)
            self.load.num_samples += start + count == request.num_tokens
        else:
            self.leave_out(request, "slack" if self.rows_left > 0 else "rows")
        return True

    def _next_chunk(self, request: Request, start: int) -> int:
        remaining = request.num_tokens - start
        return self.budget.chunk_tokens(self.load, start, remaining, request.best_effort)

    def _start(self, request: Request) -> tuple[int, int] | None:
        """Give a waiting request what the device has of its tokens, and pages for the rest and the next one.

        The last token is always computed: the next one follows from it. Returns where its first chunk begins
        and how long it is; None when it cannot start.
        """
        if self.rows_left <= 0:
            self.leave_out(request, "rows")
            return None
        cached = self.room.find_cached(request, request.num_tokens - 1)
        start = len(cached) * self.limits.page_size
        count = self._next_chunk(request, start)
        if count == 0:
            self.leave_out(request, "slack")
            return None
        self.room.device.hold(cached)  # before others make room: they may hold the same pages
        need = self.room.pages_missing(request, request.num_tokens + 1) - len(cached)
        reason = self._reason_not_to_start(request, need)
        if reason is not None:
            self.leave_out(request, reason)
            self.room.device.hold(cached, sign=-1)
            return None
        self.room.start(request, need, cached)
        return start, count

    def _reason_not_to_start(self, request: Request, need: int) -> Reason | None:
        """Whether `need` device pages can be had, and for a best-effort request a place after its prefill."""
        if not request.best_effort and self.rules.start_evicts:
            return None if self.room.make_room(need, request, only_best_effort=True) else "pages"
        if not request.best_effort:
            return None if self.room.has_room(request, need) else "pages"
        if self.state.lanes_unserved > 0:
            return "lanes_unserved"
        if not self._has_place_after_prefill(request):
            return "host_full"
        alone = not any(r.device_pages or r.incoming_pages for r in self.state.active.values())
        is_first = alone and not self.chunks
        spare = self.limits.watermark_pages if self.rules.keeps_headroom and not is_first else 0
        return None if self.room.has_room(request, need, spare) else "pages"

    def _has_place_after_prefill(self, request: Request) -> bool:
        """Under "always" a slot and host pages must be left for it, those already promised counted."""
        if self.limits.host_offload != "always" or self.state.host_failed:
            return True
        if not self.state.host_ready:
            return False
        promised = [
            r
            for r in self.state.in_phase(Phase.PREFILL, Phase.DEVICE)
            if r.best_effort and r.id not in self.room.leaving
        ]
        starting = (self.state.requests[c.request_id] for c in self.chunks)
        promised += [r for r in starting if r.phase is Phase.WAITING and r.best_effort]
        pages = sum(self.room.host_pages_missing(r, r.num_tokens + 1) for r in (*promised, request))
        return self.room.free_slots > len(promised) and self.room.host.free >= pages
