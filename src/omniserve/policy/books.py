"""The books of a State, asserted: for tests, which call State.check() after every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omniserve.policy.pages import PagePool
from omniserve.policy.request import HostHold, Limits, Phase, Request

if TYPE_CHECKING:
    from omniserve.policy.state import State


def check_books(state: State) -> None:
    """Assert what must hold between any two calls.

    Every page is free, cached or held as often as it is referenced, and known by no hash but its own; every
    slot has one owner; every request is in exactly one phase.
    """
    everyone = list(state.requests.values())
    holds = [r.host for r in everyone if r.host is not None] + state.retiring
    state.device.check([p for r in everyone for p in (r.device_pages, r.incoming_pages)])
    state.host.check([s.pages for s in holds])
    slots = [s.slot for s in holds if s.slot is not None]
    assert sorted(slots + state.free_slots) == list(range(state.limits.max_lanes)), "slots leaked"
    for phase in Phase:
        assert state.in_phase(phase) == sorted(
            (r for r in everyone if r.phase is phase), key=lambda r: r.order
        ), f"the line of {phase} is not who is in it"
    assert {r.id for r in everyone if r.phase is not Phase.WAITING} == set(state.active)
    for request in everyone:
        _check_phase(request, state.limits)
        _check_sizes(request, state)
        _check_device_hashes(request, state.device)
        if request.host is not None:
            _check_host_hashes(request, request.host, state.host)


def _check_phase(request: Request, limits: Limits) -> None:
    phase, hold = request.phase, request.host
    has_slot = hold is not None and hold.slot is not None
    assert has_slot == (phase in (Phase.MOVING_OUT, Phase.LANE, Phase.MOVING_IN)), (phase, hold)
    assert not request.incoming_pages or phase in (Phase.LANE, Phase.MOVING_IN)
    is_returning = phase is Phase.MOVING_IN or bool(request.incoming_pages)
    assert not (is_returning and limits.host_kv_is_lossy), "nothing returns from lossy KV"
    if phase is Phase.WAITING:
        assert (request.kv_tokens, hold, request.device_pages) == (0, None, [])


def _check_sizes(request: Request, state: State) -> None:
    phase = request.phase
    if phase in (Phase.DEVICE, Phase.LANE, Phase.MOVING_OUT, Phase.MOVING_IN):
        assert request.kv_tokens == request.num_tokens - 1, (phase, request)
    if phase is Phase.DEVICE:
        assert len(request.device_pages) >= state.device.pages_for(request.kv_tokens)
    if phase in (Phase.LANE, Phase.MOVING_IN):
        assert not request.device_pages
        assert len(request.hold.pages) >= state.host.pages_for(request.kv_tokens)


def _check_hash(pool: PagePool, page: int, index: int, hashes: Sequence[bytes], num_tokens: int) -> None:
    """A page of a text is known by its own hash or by none; by none unless `num_tokens` fill it."""
    is_full = (index + 1) * pool.page_size <= num_tokens and index < len(hashes)
    own = hashes[index] if is_full else None
    assert pool.hash_of(page) in (None, own), f"page {page} is known by a wrong hash"


def _check_device_hashes(request: Request, pool: PagePool) -> None:
    for i, page in enumerate(request.device_pages, request.num_released):
        _check_hash(pool, page, i, request.device_hashes, request.kv_tokens)
    for i, page in enumerate(request.incoming_pages):
        _check_hash(pool, page, i, request.device_hashes, request.fetched_tokens)


def _check_host_hashes(request: Request, hold: HostHold, pool: PagePool) -> None:
    is_lane = request.phase in (Phase.LANE, Phase.MOVING_IN)
    for i, page in enumerate(hold.pages):
        num_tokens = request.kv_tokens if is_lane else hold.copied_tokens
        _check_hash(pool, page, i, request.host_hashes, num_tokens)
    for start in hold.unlanded.values():
        page = hold.pages[start // pool.page_size]
        assert pool.hash_of(page) is None, f"page {page} is known before its copy has landed"
