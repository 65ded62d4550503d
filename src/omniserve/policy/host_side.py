"""The part of a plan that concerns the host: lanes that start tokens or come back, and copies both ways."""

from __future__ import annotations

from omniserve.policy.draft import Draft
from omniserve.policy.plan import CopyOut
from omniserve.policy.request import Phase, Request

# Lanes looked at for one that can come back: the first in line.
MAX_RETURN_CANDIDATES = 8


def allow_copies(draft: Draft) -> None:
    """Pages that may be copied by this plan; lanes get what these leave of its time."""
    room, state = draft.room, draft.state
    on_the_way = state.num_in_phase(Phase.MOVING_OUT) or room.leaving
    on_device = (state.first_best_effort(phase) for phase in (Phase.DEVICE, Phase.PREFILL))
    if room.host_usable and (on_the_way or any(on_device)):
        room.copies_left = draft.budget.copies(draft.load, room.copies_left)
        draft.load.copied_tokens = room.copies_left * draft.limits.page_size


def plan_lanes(draft: Draft) -> None:
    """Lanes start their next tokens as far as their share allows; one of them may come back."""
    if not draft.room.host_usable:
        return
    lanes = [r for r in draft.state.in_phase(Phase.LANE) if r.id not in draft.room.leaving]
    _start_return(draft, lanes)
    returning = draft.room.returning(lanes)
    startable = []
    for lane in lanes:
        if lane.id not in returning:
            if not lane.hold.in_flight:
                startable.append(lane)
        elif lane.hold.in_flight:
            draft.room.copy_in(lane, only_full_pages=True)
        elif not _stop_if_returned(draft, lane):
            startable.append(lane)
    draft.lane_share = draft.budget.share_lanes(draft.load, len(startable))
    for lane in startable:
        if len(draft.lane_starts) >= min(draft.limits.max_lane_rows, _max_starts(draft)):
            break
        if draft.room.grow_host(lane, lane.kv_tokens + 1):
            draft.lane_starts.append(lane.id)


def _max_starts(draft: Draft) -> int:
    """In passes every start costs a pass anyway; in a walk it is part of the lanes' share."""
    assert draft.lane_share is not None
    return draft.lane_share.starts if draft.is_walk else draft.limits.max_lane_rows


def _start_return(draft: Draft, lanes: list[Request]) -> None:
    """One lane at a time comes back, when the device has pages and rows to spare for it.

    None does from lossy KV: what it lost would go on as if it were exact.
    """
    limits, room, watermark = draft.limits, draft.room, draft.limits.watermark_pages
    if limits.host_offload == "always" or limits.host_kv_is_lossy or room.leaving:
        return
    if room.device.free < 2 * watermark or room.returning(lanes):
        return
    if any(room.incoming_of(r) for r in draft.state.in_phase(Phase.MOVING_IN)):
        return
    for lane in lanes[:MAX_RETURN_CANDIDATES]:
        if draft.rows_left <= 0 or not draft.budget.may_return(draft.load, lane):
            continue
        cached = room.find_cached(lane, lane.kv_tokens)
        room.device.hold(cached)
        need = draft.state.device.pages_for(lane.kv_tokens + 1) + 1 - len(cached)
        if room.has_room(lane, need + watermark, watermark):
            room.swap_in(lane, need, cached)
            return
        room.device.hold(cached, sign=-1)


def _stop_if_returned(draft: Draft, lane: Request) -> bool:
    """At its token boundary, with all full pages asked for, a returning lane waits for its tail."""
    room = draft.room
    missing = draft.state.device.pages_for(lane.kv_tokens + 1) - room.incoming_of(lane)
    if missing > 0:
        if not room.has_room(lane, missing):
            room.cancel_swap_in(lane)
            return False
        room.swap_in(lane, missing)
    if not room.copy_in(lane, only_full_pages=True):
        return False
    room.stop_lane(lane)
    room.copy_in(lane, only_full_pages=False)
    return True


def plan_copies(draft: Draft) -> None:
    """Copies both ways, and what of them leaves the device noted in the load."""
    _copies(draft)
    leaving = (move.num_tokens for move in draft.room.moves if isinstance(move, CopyOut))
    draft.load.copied_tokens = sum(leaving)


def _copies(draft: Draft) -> None:
    """Requests on the move first, then the tails of returning lanes, then mirrors of full pages."""
    room, state = draft.room, draft.state
    if not room.host_usable:
        return
    displaced = room.displaced()
    moving = [r for r in state.in_phase(Phase.MOVING_OUT) if r.id not in room.leaving]
    for request in (*moving, *displaced):
        room.copy_out(request, only_full_pages=False)
    for request in state.in_phase(Phase.MOVING_IN):
        if room.incoming_of(request) and request.id not in room.leaving:
            room.copy_in(request, only_full_pages=False)
    reserve = state.num_in_phase(Phase.LANE) + state.num_in_phase(Phase.MOVING_OUT) + len(displaced)
    for request in state.in_phase(Phase.PREFILL, Phase.DEVICE):
        if room.copies_left == 0:
            return
        if request.best_effort and request.id not in room.leaving:
            room.copy_out(request, only_full_pages=True, host_reserve=reserve)
