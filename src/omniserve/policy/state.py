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
from collections.abc import Iterator

from omniserve.policy.books import check_books
from omniserve.policy.pages import PagePool
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
from omniserve.policy.prefix import HitCount, register_device_pages, register_host_pages
from omniserve.policy.request import HostHold, Limits, Phase, Request


class State:
    """All requests and both page pools. `schedule` reads it; only the methods here write it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.device = PagePool(limits.num_device_pages, limits.page_size)
        self.host = self._host_pool()
        self.host_ready = False
        self.host_failed = limits.host_offload == "never"
        self.waiting: list[tuple[int, int]] = []
        self.active: dict[int, Request] = {}
        self.requests: dict[int, Request] = {}
        self.free_slots = list(range(limits.max_lanes - 1, -1, -1))
        self.retiring: list[HostHold] = []
        self.lanes_unserved = 0
        self.num_dropped = 0
        self.num_displaced = 0
        self.num_swapped_in = 0
        self.num_broken_promises = 0
        self.latency_sensitive_hits = HitCount()
        self.best_effort_hits = HitCount()
        self.host_hits = HitCount()
        self._lost_evictions = 0
        self._copies: dict[int, HostHold] = {}
        self._next_copy = 0
        self._cancel_slots: list[int] = []
        self._cancel_fetches: list[int] = []

    # ------------------------------------------------------------ arrivals and departures

    def add(self, request: Request) -> None:
        assert request.id not in self.requests
        self.requests[request.id] = request
        insort(self.waiting, request.order)

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
        self.lanes_unserved = 0
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
                request.phase = Phase.DEVICE
            elif request.phase in (Phase.MOVING_OUT, Phase.LANE, Phase.MOVING_IN):
                self._drop(request)

    def _host_pool(self) -> PagePool:
        limits = self.limits
        return PagePool(limits.num_host_pages, limits.host_page_size, limits.num_host_partitions)

    # ------------------------------------------------------------ reading

    @property
    def is_idle(self) -> bool:
        return not self.requests

    def first_waiting(self) -> Iterator[Request]:
        """Requests without KV, in the order in which they may start."""
        return (self.requests[request_id] for _, request_id in self.waiting)

    def in_phase(self, *phases: Phase) -> list[Request]:
        """Active requests in any of `phases`, in order of rank and arrival."""
        return sorted((r for r in self.active.values() if r.phase in phases), key=lambda r: r.order)

    @property
    def num_host_evicted(self) -> int:
        """Cached pages evicted on this host and those before it."""
        return self._lost_evictions + self.host.num_evicted

    @property
    def num_free_frames(self) -> int:
        return self.limits.num_frames - len(self._copies)

    @property
    def waits_for_host(self) -> bool:
        """Something on the host is under way and will be reported."""
        return bool(self._copies or self.retiring) or any(
            r.host is not None and r.host.in_flight for r in self.active.values()
        )

    # ------------------------------------------------------------ plan -> step

    def commit(self, plan: Plan) -> Step:
        """Carry out the plan's moves on the books and fill in ids."""
        copies_out: list[PageCopy] = []
        copies_in: list[PageCopy] = []
        for move in plan.moves:
            self._hold_cached(move)
        for move in plan.moves:
            self._commit_move(move, copies_out, copies_in)
        rows = [self._device_rows(self.active[i], 1, False) for i in plan.decodes]
        rows += [self._device_rows(self.active[c.request_id], c.num_tokens, True) for c in plan.chunks]
        lane_starts = tuple(self._start_lane(self.active[i]) for i in plan.lane_starts)
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

    def _commit_move(self, move: Move, out: list[PageCopy], back: list[PageCopy]) -> None:
        request = self.requests[move.request_id]
        match move:
            case Drop():
                self._drop(request)
            case Displace():
                self._displace(request)
            case Reserve():
                self._reserve(request, move)
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
                request.phase = Phase.MOVING_IN

    def _reserve(self, request: Request, move: Reserve) -> None:
        request.device_pages += (*move.cached, *self.device.allocate(move.num_pages, keep=move.keep))
        if request.phase is Phase.WAITING:
            request.kv_tokens = len(move.cached) * self.device.page_size
            self._count_start(request)
            self.waiting.remove(request.order)
            self.active[request.id] = request
            request.phase = Phase.PREFILL

    def _count_start(self, request: Request) -> None:
        hits = self.best_effort_hits if request.best_effort else self.latency_sensitive_hits
        hits.add(request.num_tokens, request.kv_tokens)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.kv_tokens

    def _displace(self, request: Request) -> None:
        if request.host is None:
            request.host = HostHold()
        hold = request.host
        hold.slot = self.free_slots.pop()
        missing = self.host.pages_for(request.kv_tokens + 1) - len(hold.pages)
        self._grow_hold(hold, max(0, missing))
        request.phase = Phase.MOVING_OUT
        self.num_displaced += 1
        self._release_staged(request)

    def _grow_hold(self, hold: HostHold, count: int) -> None:
        """Host pages in the partition of the first one: there its rows are queued and its KV is read."""
        near = self.host.partition_of(hold.pages[0]) if hold.pages else None
        hold.pages += self.host.allocate(count, near)

    def _release_staged(self, request: Request) -> None:
        """Free the leading device pages whose content has left them."""
        staged = request.hold.staged_tokens
        done = staged == request.kv_tokens
        clean = self.device.pages_for(staged) if done else staged // self.device.page_size
        count = min(clean - request.num_released, len(request.device_pages))
        if done:
            count = len(request.device_pages)
        if count > 0:
            self._release_device(request, request.device_pages[:count])
            del request.device_pages[:count]
            request.num_released += count

    def _release_device(self, request: Request, pages: list[int]) -> None:
        self.device.release(pages, protect=not request.best_effort)

    def _touch_device(self, request: Request) -> None:
        """Pages given up from the first to the last are to be evicted from the last to the first."""
        self.device.touch(self.device.match(request.device_hashes))

    def _share_host(self, request: Request, pages: tuple[int, ...]) -> None:
        """Pages already referenced take the place of those that would have been copied to."""
        if request.host is None:
            request.host = HostHold()
        hold = request.host
        assert hold.copied_tokens % self.host.page_size == 0, "only full pages are shared"
        first = hold.copied_tokens // self.host.page_size
        replaced = hold.pages[first : first + len(pages)]
        hold.pages[first : first + len(pages)] = pages
        self.host.release(replaced)
        num_tokens = len(pages) * self.host.page_size
        hold.copied_tokens += num_tokens
        self.host_hits.add(num_tokens, num_tokens)

    def _copy_out(self, request: Request, start: int, count: int) -> PageCopy:
        if request.host is None:
            request.host = HostHold()
        hold = request.host
        self.host_hits.add(count, 0)
        assert start == hold.copied_tokens, "copies to the host go in order"
        missing = self.host.pages_for(start + count) - len(hold.pages)
        self._grow_hold(hold, max(0, missing))
        page = request.device_pages[start // self.device.page_size - request.num_released]
        copy = self._page_copy(hold, page, start, count)
        hold.unstaged[copy.copy_id] = start
        hold.unlanded[copy.copy_id] = start
        hold.copied_tokens = start + count
        return copy

    def _copy_in(self, request: Request, start: int, count: int) -> PageCopy:
        assert start == request.fetched_tokens, "copies to the device go in order"
        page = request.incoming_pages[start // self.device.page_size]
        copy = self._page_copy(request.hold, page, start, count)
        request.hold.unfetched[copy.copy_id] = start
        request.fetched_tokens = start + count
        return copy

    def _page_copy(self, hold: HostHold, page: int, start: int, count: int) -> PageCopy:
        copy_id = self._next_copy
        self._next_copy += 1
        self._copies[copy_id] = hold
        first, last = start // self.host.page_size, (start + count - 1) // self.host.page_size
        return PageCopy(
            copy_id,
            page,
            start % self.device.page_size,
            count,
            start % self.host.page_size,
            tuple(hold.pages[first : last + 1]),
        )

    def _cancel_swap_in(self, request: Request) -> None:
        self._release_device(request, request.incoming_pages)
        request.incoming_pages = []
        request.fetched_tokens = 0
        if request.host is not None:
            self._cancel_fetches += request.host.unfetched
        if request.phase is Phase.MOVING_IN:
            request.phase = Phase.LANE

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

    def apply(self, step: Step, result: StepResult) -> list[Request]:
        """Take in what a step brought; returns the requests that finished."""
        for rows in step.rows:
            request = self.active[rows.request_id]
            request.kv_tokens += rows.num_tokens
            register_device_pages(self.device, request, rows.start // self.device.page_size)
            if rows.samples:
                request.phase = Phase.DEVICE
        self.apply_acknowledgements(result)
        self.lanes_unserved = result.lanes_unserved
        finished = []
        for token in result.tokens:
            request = self.active[token.request_id]
            request.num_tokens += 1
            if token.by_lane:
                request.kv_tokens += 1
                request.hold.in_flight = False
                register_host_pages(self.host, request)
            if token.finish_reason is not None:
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
                request.phase = Phase.LANE
                request.num_released = 0
                self._touch_device(request)
        elif request.phase is Phase.MOVING_IN and self._has_come_back(request):
            request.device_pages, request.incoming_pages = request.incoming_pages, []
            request.phase = Phase.DEVICE
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
        hold.known_pages = 0
        hold.copied_tokens = request.kv_tokens
        kept = self.host.pages_for(hold.copied_tokens)
        self.host.release(hold.pages[kept:])
        del hold.pages[kept:]

    # ------------------------------------------------------------ leaving

    def _drop(self, request: Request) -> None:
        self._leave(request)
        self.active.pop(request.id)
        request.phase = Phase.WAITING
        insort(self.waiting, request.order)
        self.num_dropped += 1
        self.num_broken_promises += not request.best_effort

    def _finish(self, request: Request) -> None:
        if request.phase is Phase.WAITING:
            self.waiting.remove(request.order)
        self._leave(request)
        self.active.pop(request.id, None)
        del self.requests[request.id]
        request.phase = Phase.FINISHED

    def _leave(self, request: Request) -> None:
        """Give up all KV. Device pages are free now; host pages when their last task or copy ends."""
        self._cancel_swap_in(request)
        self._release_device(request, request.device_pages)
        request.device_pages = []
        if request.num_released:
            self._touch_device(request)
        request.num_released = 0
        request.kv_tokens = 0
        if request.host is not None:
            self._retire(request)

    def _retire(self, request: Request) -> None:
        hold = request.hold
        request.host = None
        if hold.in_flight:
            assert hold.slot is not None
            self._cancel_slots.append(hold.slot)
        self.retiring.append(hold)
        self._free_retired()

    def _free_retired(self) -> None:
        for hold in [s for s in self.retiring if not s.is_busy]:
            self.retiring.remove(hold)
            self.host.release(hold.pages)
            if hold.slot is not None:
                self.free_slots.append(hold.slot)

    def check(self) -> None:
        """Assert the books (see books.py)."""
        check_books(self)
