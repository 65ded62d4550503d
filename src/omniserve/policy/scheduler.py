"""schedule(state, now, policy) -> Plan: one step of the policy, without side effects.

After the paper's section 3.3. Order of service: LS decode, LS chunk prefill, then best-effort prefill and
decode on the device in the order of their worth; then the lanes start their next tokens, lanes come back if
there is room, and copies use the frames that are left. Baselines differ in their Rules (budget.py) and
budgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge

from omniserve.policy.budget import Policy, Stage
from omniserve.policy.draft import Draft
from omniserve.policy.host_side import allow_copies, plan_copies, plan_lanes
from omniserve.policy.plan import Plan
from omniserve.policy.request import Phase, Request
from omniserve.policy.state import State


def schedule(state: State, now: float, policy: Policy) -> Plan:
    """Decide one step.

    now: seconds on the engine's clock. The state is not changed. The plan may be empty when everything waits
    for the host.
    """
    draft = Draft(state, now, policy)
    for stage in policy.rules.stages:
        _serve(draft, stage)
    allow_copies(draft)
    plan_lanes(draft)
    plan_copies(draft)
    if draft.is_empty:
        _break_standstill(draft)
    return draft.frozen()


def _serve(draft: Draft, stage: Stage) -> None:
    match stage:
        case "ls_decode":
            _latency_sensitive_decodes(draft)
        case "ls_prefill":
            _prefills(draft, best_effort=False)
        case "be_prefill":
            _prefills(draft, best_effort=True)
        case "be_decode":
            _best_effort_decodes(draft)
        case "best_effort":
            for part in draft.budget.best_effort_stages(draft.load):
                _serve(draft, part)
        case "running":
            _running(draft)
        case "waiting":
            _start_in_line(draft, draft.state.first_waiting())


# ---------------------------------------------------------------- latency-sensitive decode


def _latency_sensitive_decodes(draft: Draft) -> None:
    for request in list(draft.state.in_class(Phase.DEVICE, best_effort=False)):
        if request.id in draft.room.leaving:
            continue
        if draft.fits_decode(request):
            draft.decode(request, only_best_effort=False)
        else:
            draft.leave_out(request, "rows")


# ---------------------------------------------------------------- chunked prefill


def _prefills(draft: Draft, best_effort: bool) -> None:
    """In line, started or not; the first that cannot start keeps those behind it from starting."""
    parked = draft.state.in_class(Phase.PREFILL, best_effort)
    waiting = draft.state.in_class(Phase.WAITING, best_effort)
    if best_effort:  # what has pages goes on before another takes more
        _go_on(draft, parked)
        _start_in_line(draft, waiting)
    else:
        has_parked = draft.state.num_in_phase(Phase.PREFILL) > 0
        _start_in_line(draft, merge(parked, waiting, key=lambda r: r.order), has_parked)


def _go_on(draft: Draft, parked: Iterator[Request]) -> None:
    for request in parked:
        if request.id not in draft.room.leaving:
            draft.prefill(request)


def _start_in_line(draft: Draft, requests: Iterator[Request], has_parked: bool = False) -> None:
    """has_parked: started ones may stand behind the first that cannot start; else nobody behind is asked."""
    may_start = True
    for request in requests:
        if request.id in draft.room.leaving:
            continue
        if request.phase is not Phase.WAITING:
            draft.prefill(request)
        elif may_start:
            may_start = draft.prefill(request)
        if draft.rows_left <= 0 or not (may_start or has_parked):
            return


def _running(draft: Draft) -> None:
    """Every started request in line, whatever its class."""
    for request in draft.state.in_phase(Phase.PREFILL, Phase.DEVICE):
        if request.id in draft.room.leaving:
            continue
        if request.phase is Phase.PREFILL:
            draft.prefill(request)
        elif draft.fits_decode(request):
            draft.decode(request, only_best_effort=False)
        else:
            draft.leave_out(request, "rows")


# ---------------------------------------------------------------- best-effort decode on the device


def _best_effort_decodes(draft: Draft) -> None:
    room, limits = draft.room, draft.limits
    staying = [r for r in draft.state.in_class(Phase.DEVICE, best_effort=True) if r.id not in room.leaving]
    if limits.host_offload == "always" and not draft.state.host_failed:
        for request in staying:
            if room.can_displace(request):
                room.displace(request)
        return
    if room.host_usable:
        staying = _relieve_pressure(draft, staying)
    for request in staying:
        if request.id not in room.leaving:
            _place(draft, request)


def _place(draft: Draft, request: Request) -> None:
    """A row on the device, or the way to the host, where it goes on."""
    room = draft.room
    if not draft.fits_decode(request):
        can_move = room.can_displace(request)
        if can_move and draft.budget.goes_to_host(request):
            room.displace(request)
        elif can_move and not draft.budget.host_gains():
            draft.leave_out(request, "host_gains_nothing")
        else:
            draft.leave_out(request, "slack" if draft.rows_left > 0 else "rows")
        return
    need = room.pages_missing(request, request.kv_tokens + 1)
    above_watermark = room.has_room(request, need, draft.limits.watermark_pages)
    if need == 0 or above_watermark or request.order == draft.oldest_best_effort:
        draft.decode(request, only_best_effort=True)
    else:
        draft.leave_out(request, "pages")


def _relieve_pressure(draft: Draft, requests: list[Request]) -> list[Request]:
    """Below the watermark the last in line become lanes until enough pages are on their way out.

    What the next best-effort prompt needs counts too, where another lane yields tokens: lanes make room for
    it on the device.
    """
    staying = list(requests)
    next_prompt = _pages_of_next_prompt(draft) if draft.budget.host_gains() else 0
    room, limits = draft.room, draft.limits
    while staying:
        needed = sum(room.pages_missing(r, r.kv_tokens + 1) for r in staying)
        above_watermark = min(
            room.device.free - limits.watermark_pages, room.device.available(limits.prefix_reserve_pages)
        )
        expected = above_watermark + room.pages_on_the_way_out() - needed
        victim = None if expected >= next_prompt else _next_to_leave(draft, staying, is_short=expected < 0)
        if victim is None or not room.can_displace(victim):
            break
        room.displace(victim)
        staying.remove(victim)
    return staying


def _next_to_leave(draft: Draft, staying: list[Request], is_short: bool) -> Request | None:
    """The last in line that has not just moved, the first in line only when it is alone.

    If all have: the last in line where those who decode are short of pages; nobody for the sake of a prompt.
    """
    for request in reversed(staying[1:] or staying):
        if not request.has_just_moved:
            return request
    return staying[-1] if is_short else None


def _pages_of_next_prompt(draft: Draft) -> int:
    started = {c.request_id for c in draft.chunks}
    for request in draft.state.in_class(Phase.WAITING, best_effort=True):
        if request.id not in started:
            cached = draft.room.find_cached(request, request.num_tokens - 1)
            held = len(cached) - draft.room.device.num_unreferenced(cached)
            return draft.room.pages_missing(request, request.num_tokens + 1) - held
    return 0


# ---------------------------------------------------------------- nothing can advance


def _break_standstill(draft: Draft) -> None:
    """Parked prefills drop first, then the last in line; the first in line never does."""
    state = draft.state
    host_is_coming = not (state.host_ready or state.host_failed)
    if not state.requests or state.waits_for_host or host_is_coming:
        return
    first = min(r.order for r in state.requests.values())
    holders = [r for r in state.active.values() if r.order != first]
    if draft.oldest_best_effort is not None:
        holders = [r for r in holders if r.order != draft.oldest_best_effort]
    parked = [r for r in holders if r.phase is Phase.PREFILL]
    victims = parked or holders
    assert victims, f"standstill with nobody to drop: {list(state.requests.values())}"
    draft.room.drop(max(victims, key=lambda r: r.order))
