"""schedule(state, now, cost) -> Plan: one step of the policy, without side effects.

After the paper's section 3.3. Order of service: LS decode, LS chunk prefill, BE chunk prefill, BE decode on
the device; then the lanes start their next tokens, lanes come back if there is room, and copies use the
frames that are left.
"""

from __future__ import annotations

from omniserve.policy.latency import CostModel, WalkLoad
from omniserve.policy.plan import Chunk, Plan
from omniserve.policy.request import Phase, Request
from omniserve.policy.residence import Room
from omniserve.policy.state import State


def schedule(state: State, now: float, cost: CostModel) -> Plan:
    """Decide one step.

    now: seconds on the engine's clock, for models whose slack depends on time already waited. The state
    is not changed. The plan may be empty when everything waits for the host.
    """
    return _Planner(state, now, cost).plan()


class _Planner:
    """The plan in the making: rows, lane starts, and the Room they take."""

    def __init__(self, state: State, now: float, cost: CostModel) -> None:
        self.state = state
        self.limits = state.limits
        self.now = now
        self.cost = cost
        self.room = Room(state)
        self.load = WalkLoad()
        self.decodes: list[int] = []
        self.chunks: list[Chunk] = []
        self.lane_starts: list[int] = []
        self.oldest_best_effort = self._oldest_best_effort()

    def _oldest_best_effort(self) -> tuple[int, int] | None:
        """Its place in line: this request is never a victim of another best-effort one."""
        waiting = next((r for r in self.state.first_waiting() if r.best_effort), None)
        active = [r for r in self.state.active.values() if r.best_effort]
        return min((r.order for r in (*active, waiting) if r is not None), default=None)

    def plan(self) -> Plan:
        running = self.state.in_phase(Phase.DEVICE)
        self._latency_sensitive_decodes([r for r in running if not r.best_effort])
        self._prefills(best_effort=False)
        self._prefills(best_effort=True)
        self._best_effort_decodes([r for r in running if r.best_effort])
        self._lanes()
        self._copies()
        if not (self.decodes or self.chunks or self.lane_starts or self.room.moves):
            self._break_standstill()
        return self._frozen()

    def _frozen(self) -> Plan:
        is_walk = bool(self.decodes or self.chunks)
        return Plan(
            kind="walk" if is_walk else "passes",
            moves=tuple(self.room.moves),
            decodes=tuple(self.decodes),
            chunks=tuple(self.chunks),
            lane_starts=tuple(self.lane_starts),
            lane_cap=self.cost.lane_cap(self.load, self.limits.num_layers),
            budget_s=0.0 if is_walk else self.cost.pass_budget_s(),
        )

    @property
    def rows_left(self) -> int:
        return self.limits.max_num_seqs - len(self.decodes) - len(self.chunks)

    # ------------------------------------------------------------ 1. latency-sensitive decode

    def _latency_sensitive_decodes(self, requests: list[Request]) -> None:
        for request in requests:
            if request.id not in self.room.leaving and self._can_decode(request):
                self._decode(request, only_best_effort=False)

    def _can_decode(self, request: Request) -> bool:
        fits = self.cost.fits_decode(self.load, request.kv_tokens + 1, request.best_effort)
        return self.rows_left > 0 and fits

    def _decode(self, request: Request, only_best_effort: bool) -> bool:
        """Add a decode row; its next page may cost those behind it in line their place."""
        need = self.room.pages_missing(request, request.kv_tokens + 1)
        if not self.room.make_room(need, request, only_best_effort):
            return False
        if need:
            self.room.reserve(request, need)
        self.decodes.append(request.id)
        self.room.scheduled.add(request.id)
        self.load.add_decode(request.kv_tokens + 1)
        return True

    # ------------------------------------------------------------ 2. and 3. chunked prefill

    def _prefills(self, best_effort: bool) -> None:
        for request in self.state.in_phase(Phase.PREFILL):
            if request.best_effort == best_effort and request.id not in self.room.leaving:
                self._chunk(request)
        for request in self.state.first_waiting():
            if request.best_effort != best_effort:
                continue
            if self.rows_left <= 0 or not self._start(request):
                break
            self._chunk(request)

    def _start(self, request: Request) -> bool:
        """Give a waiting request what the device has of its tokens, and pages for the rest and the next one.

        The last token is always computed: the next one follows from it.
        """
        cached = self.room.find_cached(request, request.num_tokens - 1)
        if self._next_chunk(request, len(cached) * self.limits.page_size) == 0:
            return False
        self.room.device.hold(cached)  # before others make room: they may hold the same pages
        need = self.room.pages_missing(request, request.num_tokens + 1) - len(cached)
        if not self._may_start(request, need):
            self.room.device.hold(cached, sign=-1)
            return False
        self.room.start(request, need, cached)
        return True

    def _next_chunk(self, request: Request, start: int) -> int:
        remaining = request.num_tokens - start
        return self.cost.chunk_tokens(self.load, start, remaining, request.best_effort)

    def _chunk(self, request: Request) -> None:
        start = self.room.started.get(request.id, request.kv_tokens)
        count = self._next_chunk(request, start) if self.rows_left > 0 else 0
        if count:
            self.chunks.append(Chunk(request.id, start, count))
            self.room.scheduled.add(request.id)
            self.load.add_chunk(start, count)

    def _may_start(self, request: Request, need: int) -> bool:
        """Whether `need` device pages can be had, and for a best-effort request a place after its prefill."""
        if not request.best_effort:
            return self.room.make_room(need, request, only_best_effort=True)
        if self.state.lanes_unserved > 0 or not self._has_place_after_prefill(request):
            return False
        alone = not any(r.device_pages or r.incoming_pages for r in self.state.active.values())
        spare = 0 if alone and not self.chunks else self.limits.watermark_pages
        return self.room.has_room(request, need, spare)

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
        promised += [
            self.state.requests[c.request_id]
            for c in self.chunks
            if self.state.requests[c.request_id].phase is Phase.WAITING
            and self.state.requests[c.request_id].best_effort
        ]
        pages = sum(self.room.host_pages_missing(r, r.num_tokens + 1) for r in (*promised, request))
        return self.room.free_slots > len(promised) and self.room.host.free >= pages

    # ------------------------------------------------------------ 4. best-effort decode on the device

    def _best_effort_decodes(self, requests: list[Request]) -> None:
        staying = [r for r in requests if r.id not in self.room.leaving]
        if self.limits.host_offload == "always" and not self.state.host_failed:
            for request in staying:
                if self.room.can_displace(request):
                    self.room.displace(request)
            return
        if self.room.host_usable:
            staying = self._relieve_pressure(staying)
        for request in staying:
            if request.id in self.room.leaving:
                continue
            if not self._can_decode(request):
                # No row is left for it here; on the host it goes on.
                if self.room.can_displace(request):
                    self.room.displace(request)
                continue
            need = self.room.pages_missing(request, request.kv_tokens + 1)
            above_watermark = self.room.has_room(request, need, self.limits.watermark_pages)
            if need == 0 or above_watermark or request.order == self.oldest_best_effort:
                self._decode(request, only_best_effort=True)

    def _relieve_pressure(self, requests: list[Request]) -> list[Request]:
        """Below the watermark the last in line become lanes until enough pages are on their way out.

        What the next best-effort prompt needs counts too: lanes make room for it on the device.
        """
        staying = list(requests)
        next_prompt = self._pages_of_next_prompt()
        device, keep = self.room.device, self.limits.prefix_reserve_pages
        while staying:
            needed = sum(self.room.pages_missing(r, r.kv_tokens + 1) for r in staying)
            above_watermark = min(device.free - self.limits.watermark_pages, device.available(keep))
            expected = above_watermark + self.room.pages_on_the_way_out() - needed
            if expected >= next_prompt or not self.room.can_displace(staying[-1]):
                break
            self.room.displace(staying.pop())
        return staying

    def _pages_of_next_prompt(self) -> int:
        started = {c.request_id for c in self.chunks}
        for request in self.state.first_waiting():
            if request.best_effort and request.id not in started:
                cached = self.room.find_cached(request, request.num_tokens - 1)
                held = len(cached) - self.room.device.num_unreferenced(cached)
                return self.room.pages_missing(request, request.num_tokens + 1) - held
        return 0

    # ------------------------------------------------------------ 5. lanes

    def _lanes(self) -> None:
        if not self.room.host_usable:
            return
        lanes = [r for r in self.state.in_phase(Phase.LANE) if r.id not in self.room.leaving]
        self._start_swap_in(lanes)
        for lane in lanes:
            if lane.hold.in_flight:
                if self.room.incoming_of(lane):
                    self.room.copy_in(lane, only_full_pages=True)
            elif not self._stop_if_returned(lane):
                has_row = len(self.lane_starts) < self.limits.max_lane_rows
                if has_row and self.room.grow_host(lane, lane.kv_tokens + 1):
                    self.lane_starts.append(lane.id)

    def _start_swap_in(self, lanes: list[Request]) -> None:
        """One lane at a time comes back, when the device has pages and rows to spare for it.

        None does from lossy KV: what it lost would go on as if it were exact.
        """
        if self.limits.host_offload == "always" or self.limits.host_kv_is_lossy or self.room.leaving:
            return
        if any(self.room.incoming_of(r) for r in self.state.in_phase(Phase.LANE, Phase.MOVING_IN)):
            return
        for lane in lanes:
            if not self._can_decode(lane):
                continue
            cached = self.room.find_cached(lane, lane.kv_tokens)
            self.room.device.hold(cached)
            need = self.state.device.pages_for(lane.kv_tokens + 1) + 1 - len(cached)
            watermark = self.limits.watermark_pages
            if self.room.has_room(lane, need + watermark, watermark):
                self.room.swap_in(lane, need, cached)
                return
            self.room.device.hold(cached, sign=-1)

    def _stop_if_returned(self, lane: Request) -> bool:
        """At its token boundary, with all full pages asked for, a returning lane waits for its tail."""
        if not self.room.incoming_of(lane):
            return False
        missing = self.state.device.pages_for(lane.kv_tokens + 1) - self.room.incoming_of(lane)
        if missing > 0:
            if not self.room.has_room(lane, missing):
                self.room.cancel_swap_in(lane)
                return False
            self.room.swap_in(lane, missing)
        if not self.room.copy_in(lane, only_full_pages=True):
            return False
        self.room.stop_lane(lane)
        self.room.copy_in(lane, only_full_pages=False)
        return True

    # ------------------------------------------------------------ 6. copies

    def _copies(self) -> None:
        """Requests on the move first, then the tails of returning lanes, then mirrors of full pages."""
        if not self.room.host_usable:
            return
        displaced = self.room.displaced()
        moving = [r for r in self.state.in_phase(Phase.MOVING_OUT) if r.id not in self.room.leaving]
        for request in (*moving, *displaced):
            self.room.copy_out(request, only_full_pages=False)
        for request in self.state.in_phase(Phase.MOVING_IN):
            if self.room.incoming_of(request) and request.id not in self.room.leaving:
                self.room.copy_in(request, only_full_pages=False)
        if self.limits.host_offload == "never":
            return
        reserve = len(self.state.in_phase(Phase.LANE, Phase.MOVING_OUT)) + len(displaced)
        for request in self.state.in_phase(Phase.PREFILL, Phase.DEVICE):
            if request.best_effort and request.id not in self.room.leaving:
                self.room.copy_out(request, only_full_pages=True, host_reserve=reserve)

    # ------------------------------------------------------------ nothing can advance

    def _break_standstill(self) -> None:
        """Parked prefills drop first, then the last in line; the first in line never does."""
        host_is_coming = not (self.state.host_ready or self.state.host_failed)
        if not self.state.requests or self.state.waits_for_host or host_is_coming:
            return
        first = min(r.order for r in self.state.requests.values())
        holders = [r for r in self.state.active.values() if r.order != first]
        if self.oldest_best_effort is not None:
            holders = [r for r in holders if r.order != self.oldest_best_effort]
        parked = [r for r in holders if r.phase is Phase.PREFILL]
        victims = parked or holders
        assert victims, f"standstill with nobody to drop: {list(self.state.requests.values())}"
        self.room.drop(max(victims, key=lambda r: r.order))
