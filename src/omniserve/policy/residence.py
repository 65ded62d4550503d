"""Room: what a plan in the making may still use, and who gives way when that is not enough (docs/design.md).

A Room starts as a copy of the state's counts. Each decision is noted as a move and booked here, so that the
next decision sees it; the state itself does not change until the plan is committed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from omniserve.policy.plan import (
    CancelSwapIn,
    CopyIn,
    CopyOut,
    Displace,
    Drop,
    GrowHost,
    Move,
    Reserve,
    ShareHost,
    StopLane,
    SwapIn,
    Unmirror,
)
from omniserve.policy.pool_view import PoolView
from omniserve.policy.request import Phase, Request, requests_worse_than
from omniserve.policy.state import State


class Room:
    """Pages, slots and frames left to the plan, and the moves decided so far.

    leaving: requests displaced or dropped by this plan; scheduled: those that have rows in it.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.limits = state.limits
        self.moves: list[Move] = []
        self.device = PoolView(state.device)
        self.host = PoolView(state.host)
        self.free_slots = len(state.free_slots)
        self.copies_left = min(state.num_free_frames, state.limits.max_copies_per_step)
        self.leaving: set[int] = set()
        self.scheduled: set[int] = set()
        self._copied: dict[int, int] = {}
        self._fetched: dict[int, int] = {}
        self._host_pages: dict[int, int] = {}
        self._incoming: dict[int, int] = {}
        self._unmirrored: set[int] = set()

    # ------------------------------------------------------------ facts

    @property
    def host_usable(self) -> bool:
        return self.state.host_ready and not self.state.host_failed

    def host_pages_of(self, request: Request) -> int:
        held = len(request.host.pages) if request.host else 0
        return self._host_pages.get(request.id, held)

    def incoming_of(self, request: Request) -> int:
        return self._incoming.get(request.id, len(request.incoming_pages))

    def returning(self, lanes: Iterable[Request]) -> set[int]:
        """Ids of the lanes that hold device pages to come back to."""
        candidates = [r for r in lanes if r.incoming_pages or r.id in self._incoming]
        return {r.id for r in candidates if self.incoming_of(r)}

    def _incoming_ids(self, request: Request) -> list[int]:
        """Device pages that a returning lane holds and this plan has not taken from it."""
        return request.incoming_pages if self._incoming.get(request.id) != 0 else []

    def keep_for(self, request: Request) -> int:
        """Protected cached device pages that stay when this request needs pages.

        Best-effort work leaves a reserve of latency-sensitive prefixes, unless it is so large that it could
        never be served beside them.
        """
        if not request.best_effort:
            return 0
        longest = self.state.device.pages_for(request.num_prompt + request.max_tokens)
        return min(self.limits.prefix_reserve_pages, max(0, self.limits.num_device_pages - longest))

    def has_room(self, request: Request, need: int, spare: int = 0) -> bool:
        """Whether `need` device pages can be had without moving anybody, `spare` free ones left."""
        return need <= self.device.available(self.keep_for(request)) and self.device.free - need >= spare

    def find_cached(self, request: Request, num_tokens: int) -> list[int]:
        """Device pages, full ones only, that hold the beginning of a request's first `num_tokens` tokens."""
        return self.device.match(request.device_hashes, last=num_tokens // self.limits.page_size)

    def pages_missing(self, request: Request, num_tokens: int) -> int:
        """Device pages a request lacks to hold `num_tokens` tokens."""
        return max(0, self.state.device.pages_for(num_tokens) - len(request.device_pages))

    def host_pages_missing(self, request: Request, num_tokens: int) -> int:
        return max(0, self.state.host.pages_for(num_tokens) - self.host_pages_of(request))

    def can_displace(self, request: Request) -> bool:
        """Whether the request can start to move now: it decodes, a slot and host pages are free.

        Only best-effort requests move: a chat on the host would stop with the host. One that the host could
        not hold to its last token stays on the device.
        """
        longest = self.state.host.pages_for(request.num_prompt + request.max_tokens)
        if request.phase is not Phase.DEVICE or request.id in self.leaving:
            return False
        return (
            self.host_usable
            and request.best_effort
            and longest <= self.limits.num_host_pages
            and self.free_slots > 0
            and self._host_pages_to_take(request) <= self.host.free
        )

    def _host_pages_to_take(self, request: Request) -> int:
        """Free host pages that a displacement uses up: none for those that other requests hold too."""
        hits = self._find_on_host(request)
        held_by_others = len(hits) - self.host.num_unreferenced(hits)
        return self.host_pages_missing(request, request.kv_tokens + 1) - held_by_others

    def _find_on_host(self, request: Request) -> list[int]:
        """Host pages that hold the next full pages of a request; none while a page is partly copied."""
        copied, size = self._copied_of(request), self.limits.host_page_size
        if copied % size or copied + size > request.kv_tokens:
            return []
        return self.host.match(request.host_hashes, copied // size, request.kv_tokens // size)

    def _copied_of(self, request: Request) -> int:
        return self._copied.get(request.id, request.host.copied_tokens if request.host else 0)

    def displaced(self) -> list[Request]:
        """Requests that this plan displaces."""
        return [self.state.active[m.request_id] for m in self.moves if isinstance(m, Displace)]

    def pages_on_the_way_out(self) -> int:
        """Device pages that displaced requests will free once their copies have left."""
        moving = self.state.in_phase(Phase.MOVING_OUT)
        pages = [page for r in self.displaced() for page in r.device_pages[self._clean_pages(r) :]]
        pages += [page for r in moving if r.id not in self.leaving for page in r.device_pages]
        return sum(self.device.references(page) == 1 for page in pages)

    def _clean_pages(self, request: Request) -> int:
        """Device pages that a displacement frees at once: their content is on the host or in a frame."""
        staged = self._copied_of(request)
        if request.host is not None and request.host.unstaged:
            staged = request.host.staged_tokens
        if staged == request.kv_tokens:
            return len(request.device_pages)
        return staged // self.limits.page_size - request.num_released

    # ------------------------------------------------------------ decisions

    def reserve(self, request: Request, count: int) -> None:
        keep = self.keep_for(request)
        self.device.take(count, keep)
        self.moves.append(Reserve(request.id, count, keep=keep))

    def start(self, request: Request, count: int, cached: list[int]) -> None:
        """A prefill starts with `cached` pages, already held, and `count` others."""
        keep = self.keep_for(request)
        self.device.take(count, keep)
        self.moves.append(Reserve(request.id, count, tuple(cached), keep))

    def displace(self, request: Request) -> None:
        self._share_host(request)
        self.device.release(request.device_pages[: self._clean_pages(request)])
        missing = self.host_pages_missing(request, request.kv_tokens + 1)
        self.host.take(missing)
        self._host_pages[request.id] = self.host_pages_of(request) + missing
        self.free_slots -= 1
        self.leaving.add(request.id)
        self.moves.append(Displace(request.id))

    def drop(self, request: Request) -> None:
        self.device.release(request.device_pages, protect=not request.best_effort)
        self.device.release(self._incoming_ids(request))
        self._incoming[request.id] = 0
        self.leaving.add(request.id)
        self.moves.append(Drop(request.id))

    def cancel_swap_in(self, request: Request) -> None:
        self.device.release(self._incoming_ids(request))
        self._incoming[request.id] = 0
        self.moves.append(CancelSwapIn(request.id))

    def swap_in(self, request: Request, count: int, cached: Sequence[int] = ()) -> None:
        """Device pages for a returning lane: `cached` ones, already held, whose content need not be fetched,
        and `count` others.
        """
        keep = self.keep_for(request)
        self.device.take(count, keep)
        self._incoming[request.id] = self.incoming_of(request) + len(cached) + count
        if cached:
            self._fetched[request.id] = len(cached) * self.limits.page_size
        self.moves.append(SwapIn(request.id, count, tuple(cached), keep))

    def stop_lane(self, request: Request) -> None:
        self.moves.append(StopLane(request.id))

    def grow_host(self, request: Request, num_tokens: int) -> bool:
        """Give a lane the host pages for `num_tokens` tokens; mirrors give way. False when none are left."""
        missing = self.host_pages_missing(request, num_tokens)
        while self.host.free < missing and self._unmirror_one():
            pass
        if self.host.free < missing:
            return False
        if missing:
            self.host.take(missing)
            self._host_pages[request.id] = self.host_pages_of(request) + missing
            self.moves.append(GrowHost(request.id, missing))
        return True

    def _unmirror_one(self) -> bool:
        """Take the host pages of the last in line whose KV is all on the device."""
        mirrored = [
            r
            for r in self.state.in_phase(Phase.DEVICE, Phase.PREFILL)
            if r.host and not r.host.is_busy and r.id not in self.leaving | self._unmirrored and r.host.pages
        ]
        if not mirrored:
            return False
        victim = mirrored[-1]
        self.host.release(victim.hold.pages)
        self._unmirrored.add(victim.id)
        self.moves.append(Unmirror(victim.id))
        return True

    # ------------------------------------------------------------ making room

    def make_room(self, need: int, requester: Request, only_best_effort: bool) -> bool:
        """Free `need` device pages for `requester` at the expense of those behind it in line.

        First lanes that were coming back stay lanes, then the last in line is displaced (its clean pages
        are free at once), then dropped. For a best-effort requester those that have just moved are displaced
        last. Nothing is done unless all of it is enough: nobody is evicted for a request that then is not
        served.
        """
        keep = self.keep_for(requester)
        if need <= self.device.available(keep):
            return True
        behind = [
            r
            for r in requests_worse_than(self.state.active.values(), requester)
            if r.id not in self.leaving | self.scheduled and (r.best_effort or not only_best_effort)
        ]
        owned = [pages for r in behind for pages in (r.device_pages, self._incoming_ids(r))]
        if self.device.available_without(owned, keep) < need:
            return False
        for request in behind:
            if self.device.available(keep) < need and self.incoming_of(request):
                self.cancel_swap_in(request)
        stayed_first = sorted(behind, key=lambda r: r.has_just_moved)
        for request in stayed_first if requester.best_effort else behind:
            is_short = self.device.available(keep) < need
            if is_short and self.can_displace(request) and self._clean_pages(request) > 0:
                self.displace(request)
        for request in behind:
            if self.device.available(keep) < need and request.device_pages:
                self._drop_or_escalate(request)
        return self.device.available(keep) >= need

    def _drop_or_escalate(self, request: Request) -> None:
        """Drop a victim; one that this plan already displaced is dropped instead."""
        displaced = Displace(request.id)
        if displaced not in self.moves:
            self.drop(request)
            return
        # In place: a reservation decided since then may already count on the clean pages.
        self.moves[self.moves.index(displaced)] = Drop(request.id)
        self.free_slots += 1
        self.device.release(request.device_pages[self._clean_pages(request) :])

    # ------------------------------------------------------------ copies

    def copy_out(self, request: Request, only_full_pages: bool, host_reserve: int = 0) -> None:
        """Copy what is not on the host yet, page by page, while frames and host pages last."""
        size = self.limits.page_size
        if request.id in self._unmirrored:
            return
        while True:
            self._share_host(request, host_reserve)
            copied = self._copied_of(request)
            page_end = (copied // size + 1) * size
            end = min(page_end, request.kv_tokens)
            if copied >= end or self.copies_left == 0 or (only_full_pages and end < page_end):
                return
            missing = self.host_pages_missing(request, end)
            if missing > max(0, self.host.free - host_reserve):
                return
            self.host.take(missing)
            self._host_pages[request.id] = self.host_pages_of(request) + missing
            self.moves.append(CopyOut(request.id, copied, end - copied))
            self._copied[request.id] = end
            self.copies_left -= 1

    def _share_host(self, request: Request, host_reserve: int = 0) -> None:
        """Refer to the next full pages as far as the host has them already; `host_reserve` free ones stay."""
        hits = self._find_on_host(request)
        while hits and self.host.free - self.host.num_unreferenced(hits) < host_reserve:
            hits.pop()
        if not hits:
            return
        size = self.limits.host_page_size
        copied = self._copied_of(request)
        first, last = copied // size, copied // size + len(hits)
        self.host.hold(hits)
        self.host.release(request.host.pages[first:last] if request.host else [])
        self._host_pages[request.id] = max(self.host_pages_of(request), last)
        self._copied[request.id] = last * size
        self.moves.append(ShareHost(request.id, tuple(hits)))

    def copy_in(self, request: Request, only_full_pages: bool) -> bool:
        """Fetch what is not on the device yet; True when nothing of that kind is left to ask for."""
        fetched = self._fetched.get(request.id, request.fetched_tokens)
        page_size = self.limits.page_size
        end = request.kv_tokens - request.kv_tokens % page_size if only_full_pages else request.kv_tokens
        while self.copies_left > 0 and fetched < end:
            count = min(page_size, end - fetched)
            self.moves.append(CopyIn(request.id, fetched, count))
            fetched += count
            self.copies_left -= 1
        self._fetched[request.id] = fetched
        return fetched >= end
