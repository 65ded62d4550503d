"""Requests, where their KV lives, and the only code that changes either.

    WAITING --Reserve--> PREFILL --last chunk--> DEVICE --Displace--> MOVING_OUT --landed--> LANE
       ^                    |                      ^  |                    |                   |
       +------- Drop -------+----------------------|--+--------------------+-------------------+
                                                   +---- fetched ---- MOVING_IN <---StopLane---+

A request in PREFILL that gets no chunk is *parked*: it keeps its pages. One in DEVICE whose full pages have
copies on the host is *mirrored*. A LANE with reserved device pages is *coming back*: its full pages are
fetched while it decodes. Once decoding, kv_tokens == num_tokens - 1: the last token has no KV yet.
"""

from __future__ import annotations

from bisect import insort

from omniserve.policy.books import check_books
from omniserve.policy.ledger import Ledger
from omniserve.policy.plan import (
    CancelSwapIn,
    CopyIn,
    CopyOut,
    DeviceRows,
    Displace,
    Drop,
    GrowHost,
    LaneStart,
    Move,
    PageCopy,
    Plan,
    Reserve,
    ShareHost,
    Step,
    StepResult,
    StopLane,
    SwapIn,
    Unmirror,
)
from omniserve.policy.prefix import register_device_pages, register_host_pages
from omniserve.policy.request import Phase, Request

# Weight of the newest walk in the running mean of lane rows.
NEWEST_WALK = 0.2


class State(Ledger):
    """The Ledger and what happens to it: arrivals and departures, plans, results, news of the host."""

    # ------------------------------------------------------------ arrivals and departures

    def note_arrival(self, request: Request, now: float) -> None:
        """Before anybody has decided on it: refused ones count, they would have needed room."""
        if request.slo is not None:
            self.arrivals.note(request, now, request.num_tokens - self.tokens_done(request))

    def add(self, request: Request) -> None:
        assert request.id not in self.requests
        self.requests[request.id] = request
        insort(self._lines[request.phase], request.order)

    def abort(self, request_id: int) -> bool:
        """Forget a request in any phase; False when it is unknown or already finished."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        self._finish(request)
        self.lanes_unserved = 0  # it may have been one of them; the next walk counts again
        return True

    def take_cancels(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Slots and fetches the executor must cancel before it does anything else."""
        cancels = tuple(self._cancel_slots), tuple(self._cancel_fetches)
        self._cancel_slots, self._cancel_fetches = [], []
        return cancels

    def host_started(self) -> None:
        self.host_ready = True

    def host_lost(self, failed_for_good: bool = False) -> None:
        """The host is gone with all its KV: what depended on it recomputes, the rest goes on."""
        self.host_ready = False
        self.host_failed = self.host_failed or failed_for_good
        self.lanes_unserved, self.lanes_waiting, self.lane_rows_per_walk = 0, (), 0.0
        self.retiring.clear()
        self._copies.clear()
        self._cancel_slots, self._cancel_fetches = [], []
        self._lost_evictions += self.host.num_evicted
        self.host = self._host_pool()
        self.free_slots = list(range(self.limits.max_lanes - 1, -1, -1))
        for request in list(self.active.values()):
            if request.host is None:
                continue
            request.host = None
            if request.phase is Phase.MOVING_OUT and request.num_released == 0:
                self._enter(request, Phase.DEVICE)
            elif request.phase in (Phase.MOVING_OUT, Phase.LANE, Phase.MOVING_IN):
                self._drop(request)

    # ------------------------------------------------------------ plan -> step

    def commit(self, plan: Plan, now: float) -> Step:
        """Carry out the plan's moves on the books and fill in ids. now: on the engine's clock."""
        copies_out: list[PageCopy] = []
        copies_in: list[PageCopy] = []
        for move in plan.moves:
            self._hold_cached(move)
        for move in plan.moves:
            self._commit_move(move, copies_out, copies_in, now)
        rows = [self._device_rows(self.active[i], 1, False) for i in plan.decodes]
        rows += [self._device_rows(self.active[c.request_id], c.num_tokens, True) for c in plan.chunks]
        lane_starts = tuple(self._start_lane(self.active[i]) for i in plan.lane_starts)
        self.best_effort_debt_s = plan.best_effort_debt_s
        cancel_slots, cancel_fetches = self.take_cancels()
        return Step(
            kind=plan.kind,
            rows=tuple(rows),
            lane_starts=lane_starts,
            lane_cap=plan.lane_cap,
            budget_s=plan.budget_s,
            cancel_slots=cancel_slots,
            cancel_fetches=cancel_fetches,
            copies_out=tuple(copies_out),
            copies_in=tuple(copies_in),
        )

    def _hold_cached(self, move: Move) -> None:
        """Before anything is allocated: what the plan refers to is not evicted by it."""
        match move:
            case Reserve(cached=pages) | SwapIn(cached=pages):
                self.device.share(pages)
            case ShareHost(pages=pages):
                self.host.share(pages)

    def _commit_move(self, move: Move, out: list[PageCopy], back: list[PageCopy], now: float) -> None:
        request = self.requests[move.request_id]
        match move:
            case Drop():
                self._drop(request)
            case Displace():
                self._displace(request)
            case Reserve():
                self._reserve(request, move, now)
            case GrowHost(num_pages=count):
                self._grow_hold(request.hold, count)
            case ShareHost(pages=pages):
                self._share_host(request, pages)
            case CopyOut(start=start, num_tokens=count):
                out.append(self._copy_out(request, start, count))
            case Unmirror():
                self._retire(request)
            case SwapIn(num_pages=count, cached=cached, keep=keep):
                request.fetched_tokens += len(cached) * self.device.page_size
                request.incoming_pages += (*cached, *self.device.allocate(count, keep=keep))
            case CopyIn(start=start, num_tokens=count):
                back.append(self._copy_in(request, start, count))
            case CancelSwapIn():
                self._cancel_swap_in(request)
            case StopLane():
                self._enter(request, Phase.MOVING_IN)

    def _device_rows(self, request: Request, count: int, is_prefill: bool) -> DeviceRows:
        start = request.kv_tokens
        samples = start + count == request.num_tokens
        return DeviceRows(request.id, start, count, samples, is_prefill, tuple(request.device_pages))

    def _start_lane(self, request: Request) -> LaneStart:
        hold = request.hold
        assert hold.slot is not None, "a lane owns a slot"
        assert not hold.in_flight, "one row in flight"
        assert request.phase is Phase.LANE
        assert len(hold.pages) >= self.host.pages_for(request.kv_tokens + 1), "a lane owns its next page"
        first = hold.known_pages
        hold.known_pages = len(hold.pages)
        hold.in_flight = True
        return LaneStart(request.id, hold.slot, request.kv_tokens, first, tuple(hold.pages[first:]))

    # ------------------------------------------------------------ result -> state

    def apply(self, step: Step, result: StepResult, now: float) -> list[Request]:
        """Take in what a step brought, all of it there at `now`; returns the requests that finished."""
        for rows in step.rows:
            request = self.active[rows.request_id]
            request.kv_tokens += rows.num_tokens
            register_device_pages(self.device, request, rows.start // self.device.page_size)
            if rows.samples:
                self._enter(request, Phase.DEVICE)
        self.apply_acknowledgements(result)
        self.lanes_unserved = result.lanes_unserved
        self.lanes_waiting = result.lanes_waiting
        if step.kind == "walk":
            self.last_walk_s = now
            self.lane_rows_per_walk += NEWEST_WALK * (result.lane_rows - self.lane_rows_per_walk)
        finished = []
        for token in result.tokens:
            request = self.active[token.request_id]
            request.num_tokens += 1
            request.last_token_s = now
            if request.first_token_s is None:
                request.first_token_s = now
                self.promises.note_first_token(request, now)
            if token.by_lane:
                request.kv_tokens += 1
                request.hold.in_flight = False
                register_host_pages(self.host, request)
            if token.finish_reason is not None:
                self.lengths.add(request)
                self.promises.note_end(request, now)
                self._finish(request)
                finished.append(request)
        return finished

    def apply_acknowledgements(self, result: StepResult) -> None:
        """Copies that left, landed or came back, and cancelled slots whose task has ended."""
        for copy_id in result.staged:
            if copy_id in self._copies:
                self._copies[copy_id].unstaged.pop(copy_id, None)
        for copy_id in result.arrived:
            hold = self._copies.pop(copy_id, None)
            if hold is None:
                continue  # of a host that is gone
            for pending in (hold.unstaged, hold.unlanded, hold.unfetched):
                pending.pop(copy_id, None)
        for hold in self.retiring:
            if hold.slot in result.drained:
                hold.in_flight = False
        for request in self.active.values():
            self._advance(request)
        self._free_retired()

    def _advance(self, request: Request) -> None:
        """Moves that complete by themselves once their copies have arrived."""
        hold = request.host
        if hold is None:
            return
        register_host_pages(self.host, request)
        if request.phase is Phase.MOVING_OUT:
            self._release_staged(request)
            if hold.copied_tokens == request.kv_tokens and not hold.unlanded:
                self._enter(request, Phase.LANE)
                request.num_released = 0
                self._touch_device(request)
        elif request.phase is Phase.MOVING_IN and self._has_come_back(request):
            request.device_pages, request.incoming_pages = request.incoming_pages, []
            self._enter(request, Phase.DEVICE)
            register_device_pages(self.device, request, 0)
            self.num_swapped_in += 1
            self._keep_as_mirror(request)

    def _has_come_back(self, request: Request) -> bool:
        return request.fetched_tokens == request.kv_tokens and not request.hold.unfetched

    def _keep_as_mirror(self, request: Request) -> None:
        """Back on the device: the slot is free; what is on the host stays a valid copy."""
        hold = request.hold
        request.fetched_tokens = 0
        assert hold.slot is not None, "a lane owns a slot"
        assert not hold.in_flight, "a lane comes back at its token boundary"
        self.free_slots.append(hold.slot)
        hold.slot = None
        request.moved_at = request.num_tokens
        hold.known_pages = 0
        hold.copied_tokens = request.kv_tokens
        kept = self.host.pages_for(hold.copied_tokens)
        self.host.release(hold.pages[kept:])
        del hold.pages[kept:]

    def check(self) -> None:
        """Assert the books (see books.py)."""
        check_books(self)
