"""Room: what a plan in the making may still use, and who gives way when that is not enough (docs/design.md).

A Room starts as a copy of the state's counts. Each decision is noted as a move and booked here, so that the
next decision sees it; the state itself does not change until the plan is committed.
"""

from __future__ import annotations

from omniserve.policy.plan import (
    CancelSwapIn,
    CopyIn,
    CopyOut,
    Displace,
    Drop,
    GrowHost,
    Move,
    Reserve,
    StopLane,
    SwapIn,
    Unmirror,
)
from omniserve.policy.request import Phase, Request, requests_worse_than
from omniserve.policy.state import State


class Room:
    """Free pages, slots and frames left to the plan, and the moves decided so far.

    leaving: requests displaced or dropped by this plan; scheduled: those that have rows in it.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.limits = state.limits
        self.moves: list[Move] = []
        self.free_device = state.device.num_free
        self.free_host = state.host.num_free
        self.free_slots = len(state.free_slots)
        self.copies_left = min(state.num_free_frames, state.limits.max_copies_per_step)
        self.leaving: set[int] = set()
        self.scheduled: set[int] = set()
        self._copied: dict[int, int] = {}
        self._fetched: dict[int, int] = {}
        self._host_pages: dict[int, int] = {}
        self._incoming: dict[int, int] = {}

    # ------------------------------------------------------------ facts

    @property
    def host_usable(self) -> bool:
        return self.state.host_ready and not self.state.host_failed

    def host_pages_of(self, request: Request) -> int:
        held = len(request.host.pages) if request.host else 0
        return self._host_pages.get(request.id, held)

    def incoming_of(self, request: Request) -> int:
        return self._incoming.get(request.id, len(request.incoming_pages))

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
        return (
            self.host_usable
            and request.best_effort
            and longest <= self.limits.num_host_pages
            and request.phase is Phase.DEVICE
            and request.id not in self.leaving
            and self.free_slots > 0
            and self.host_pages_missing(request, request.kv_tokens + 1) <= self.free_host
        )

    def displaced(self) -> list[Request]:
        """Requests that this plan displaces."""
        return [self.state.active[m.request_id] for m in self.moves if isinstance(m, Displace)]

    def pages_on_the_way_out(self) -> int:
        """Device pages that displaced requests will free once their copies have left."""
        moving = (r for r in self.state.active.values() if r.phase is Phase.MOVING_OUT)
        dirty = sum(len(r.device_pages) - self._clean_pages(r) for r in self.displaced())
        return dirty + sum(len(r.device_pages) for r in moving if r.id not in self.leaving)

    def _clean_pages(self, request: Request) -> int:
        """Device pages that a displacement frees at once: their content is on the host or in a frame."""
        if request.host is None:
            return 0
        staged = request.host.staged_tokens
        if staged == request.kv_tokens:
            return len(request.device_pages)
        return staged // self.limits.page_size - request.num_released

    # ------------------------------------------------------------ decisions

    def reserve(self, request: Request, count: int) -> None:
        assert count <= self.free_device
        self.free_device -= count
        self.moves.append(Reserve(request.id, count))

    def displace(self, request: Request) -> None:
        self.free_device += self._clean_pages(request)
        missing = self.host_pages_missing(request, request.kv_tokens + 1)
        self.free_host -= missing
        self._host_pages[request.id] = self.host_pages_of(request) + missing
        self.free_slots -= 1
        self.leaving.add(request.id)
        self.moves.append(Displace(request.id))

    def drop(self, request: Request) -> None:
        self.free_device += len(request.device_pages) + self.incoming_of(request)
        self.leaving.add(request.id)
        self.moves.append(Drop(request.id))

    def cancel_swap_in(self, request: Request) -> None:
        self.free_device += self.incoming_of(request)
        self._incoming[request.id] = 0
        self.moves.append(CancelSwapIn(request.id))

    def swap_in(self, request: Request, count: int) -> None:
        assert count <= self.free_device
        self.free_device -= count
        self._incoming[request.id] = self.incoming_of(request) + count
        self.moves.append(SwapIn(request.id, count))

    def stop_lane(self, request: Request) -> None:
        self.moves.append(StopLane(request.id))

    def grow_host(self, request: Request, num_tokens: int) -> bool:
        """Give a lane the host pages for `num_tokens` tokens; mirrors give way. False when none are left."""
        missing = self.host_pages_missing(request, num_tokens)
        while self.free_host < missing and self._unmirror_one():
            pass
        if self.free_host < missing:
            return False
        if missing:
            self.free_host -= missing
            self._host_pages[request.id] = self.host_pages_of(request) + missing
            self.moves.append(GrowHost(request.id, missing))
        return True

    def _unmirror_one(self) -> bool:
        """Take the host pages of the last in line whose KV is all on the device."""
        mirrored = [
            r
            for r in self.state.in_phase(Phase.DEVICE, Phase.PREFILL)
            if r.host and not r.host.is_busy and r.id not in self.leaving and self.host_pages_of(r) > 0
        ]
        if not mirrored:
            return False
        victim = mirrored[-1]
        self.free_host += self.host_pages_of(victim)
        self._host_pages[victim.id] = 0
        self._copied[victim.id] = victim.kv_tokens  # no new mirror in this plan
        self.moves.append(Unmirror(victim.id))
        return True

    # ------------------------------------------------------------ making room

    def make_room(self, need: int, requester: Request, only_best_effort: bool) -> bool:
        """Free `need` device pages for `requester` at the expense of those behind it in line.

        First lanes that were coming back stay lanes, then the last in line is displaced (its clean pages
        are free at once), then dropped. Nothing is done unless all of it is enough: nobody is evicted for
        a request that then is not served.
        """
        if need <= self.free_device:
            return True
        behind = [
            r
            for r in requests_worse_than(self.state.active.values(), requester)
            if r.id not in self.leaving | self.scheduled and (r.best_effort or not only_best_effort)
        ]
        available = sum(len(r.device_pages) + self.incoming_of(r) for r in behind)
        if self.free_device + available < need:
            return False
        for request in behind:
            if self.free_device < need and self.incoming_of(request):
                self.cancel_swap_in(request)
        for request in behind:
            if self.free_device < need and self.can_displace(request) and self._clean_pages(request) > 0:
                self.displace(request)
        for request in behind:
            if self.free_device < need and request.device_pages:
                self._drop_or_escalate(request)
        return self.free_device >= need

    def _drop_or_escalate(self, request: Request) -> None:
        """Drop a victim; one that this plan already displaced is dropped instead."""
        displaced = Displace(request.id)
        if displaced not in self.moves:
            self.drop(request)
            return
        # In place: a reservation decided since then may already count on the clean pages.
        self.moves[self.moves.index(displaced)] = Drop(request.id)
        self.free_slots += 1
        self.free_device += len(request.device_pages) - self._clean_pages(request)

    # ------------------------------------------------------------ copies

    def copy_out(self, request: Request, only_full_pages: bool, host_reserve: int = 0) -> None:
        """Copy what is not on the host yet, page by page, while frames and host pages last."""
        copied = self._copied.get(request.id, request.host.copied_tokens if request.host else 0)
        while self.copies_left > 0 and copied < request.kv_tokens:
            count = min(self.limits.page_size, request.kv_tokens - copied)
            if only_full_pages and count < self.limits.page_size:
                break
            missing = self.host_pages_missing(request, copied + count)
            if missing > max(0, self.free_host - host_reserve):
                break
            self.free_host -= missing
            self._host_pages[request.id] = self.host_pages_of(request) + missing
            self.moves.append(CopyOut(request.id, copied, count))
            copied += count
            self.copies_left -= 1
        self._copied[request.id] = copied

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
