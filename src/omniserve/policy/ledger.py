"""Who is in which phase and holds what: pages of both pools, slots, copies under way.

Each method is one elementary change, by which all books stay even (books.py); state.py says when they happen.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import merge
from itertools import islice

from omniserve.policy.arrivals import Arrivals
from omniserve.policy.lengths import Lengths
from omniserve.policy.pages import PagePool
from omniserve.policy.plan import PageCopy, Reserve
from omniserve.policy.prefix import HitCount
from omniserve.policy.promises import Promises
from omniserve.policy.request import HostHold, Limits, Order, Phase, Request


class Ledger:
    """All requests and both page pools. `schedule` reads it.

    best_effort_debt_s: seconds of device time owed to best-effort work by its guaranteed share.
    lane_rows_per_walk: running mean of lane rows that entered, over all layers.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.device = PagePool(limits.num_device_pages, limits.page_size)
        self.host = self._host_pool()
        self.host_ready = False
        self.host_failed = limits.host_offload == "never"
        self._lines: dict[Phase, list[Order]] = {phase: [] for phase in Phase}
        self.active: dict[int, Request] = {}
        self.requests: dict[int, Request] = {}
        self.free_slots = list(range(limits.max_lanes - 1, -1, -1))
        self.retiring: list[HostHold] = []
        self.lanes_unserved = 0
        self.lanes_waiting: tuple[int, ...] = ()  # by layer, at the end of the last step
        self.best_effort_debt_s = 0.0
        self.lane_rows_per_walk = 0.0
        self.last_walk_s: float | None = None  # its end, on the engine's clock
        self.lengths = Lengths()
        self.arrivals = Arrivals()
        self.promises = Promises()
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

    def _host_pool(self) -> PagePool:
        limits = self.limits
        return PagePool(limits.num_host_pages, limits.host_page_size, limits.num_host_partitions)

    # ------------------------------------------------------------ reading

    @property
    def is_idle(self) -> bool:
        return not self.requests

    def first_waiting(self) -> Iterator[Request]:
        """Requests without KV, in the order in which they may start."""
        return (self.requests[order[-1]] for order in self._lines[Phase.WAITING])

    def num_in_phase(self, phase: Phase) -> int:
        return len(self._lines[phase])

    def in_phase(self, *phases: Phase) -> list[Request]:
        """Requests in any of `phases`, in line."""
        line = self._lines[phases[0]]
        if len(phases) > 1:
            line = sorted(order for phase in phases for order in self._lines[phase])
        return [self.requests[order[-1]] for order in line]

    def in_class(self, phase: Phase, best_effort: bool) -> Iterator[Request]:
        """Those of a phase of either kind, in line: every best-effort class ranks behind all others."""
        line = self._lines[phase]
        first = self._first_best_effort(line)
        part = islice(line, first, None) if best_effort else islice(line, first)
        return (self.requests[order[-1]] for order in part)

    def pending_chats(self) -> list[Request]:
        """Those that are not best-effort and have no first token, started or not, in line."""
        parked = self.in_class(Phase.PREFILL, best_effort=False)
        return list(merge(parked, self.in_class(Phase.WAITING, best_effort=False), key=lambda r: r.order))

    def first_best_effort(self, phase: Phase) -> Request | None:
        """The first best-effort request in a phase's line."""
        return next(self.in_class(phase, best_effort=True), None)

    def _first_best_effort(self, line: list[Order]) -> int:
        return bisect_left(line, True, key=lambda order: self.requests[order[-1]].best_effort)

    def tokens_done(self, request: Request) -> int:
        """Tokens of its text that need no computing: they have KV, or the cache would give it now."""
        if request.phase is not Phase.WAITING:
            return request.kv_tokens
        last = (request.num_tokens - 1) // self.limits.page_size  # the last token is always computed
        return len(self.device.match(request.device_hashes, last=last)) * self.limits.page_size

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

    def _enter(self, request: Request, phase: Phase) -> None:
        """Leave one phase's line for another's."""
        line = self._lines[request.phase]
        del line[bisect_left(line, request.order)]
        request.phase = phase
        insort(self._lines[phase], request.order)

    # ------------------------------------------------------------ moves

    def _reserve(self, request: Request, move: Reserve, now: float) -> None:
        request.device_pages += (*move.cached, *self.device.allocate(move.num_pages, keep=move.keep))
        if request.phase is Phase.WAITING:
            request.kv_tokens = len(move.cached) * self.device.page_size
            self._count_start(request)
            if request.first_token_s is None:
                request.started_s = now
            self.active[request.id] = request
            self._enter(request, Phase.PREFILL)

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
        self._enter(request, Phase.MOVING_OUT)
        request.moved_at = request.num_tokens
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
            self._enter(request, Phase.LANE)

    # ------------------------------------------------------------ leaving

    def _drop(self, request: Request) -> None:
        self._leave(request)
        self.active.pop(request.id)
        self._enter(request, Phase.WAITING)
        self.num_dropped += 1
        self.num_broken_promises += not request.best_effort

    def _finish(self, request: Request) -> None:
        self._leave(request)
        self.active.pop(request.id, None)
        del self.requests[request.id]
        line = self._lines[request.phase]
        del line[bisect_left(line, request.order)]
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
