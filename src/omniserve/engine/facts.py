"""What stats() reads off the state and the host when somebody asks: nothing here is counted on the way."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from omniserve.host.supervisor import Host
from omniserve.policy.request import Phase
from omniserve.policy.state import State

HELD_PHASES = tuple(phase for phase in Phase if phase is not Phase.FINISHED)


def state_facts(state: State, now: float) -> dict[str, Any]:
    """Requests by residence, pages by owner, the prefix cache, and how long lanes have waited."""
    return {
        "requests": {phase.value: state.num_in_phase(phase) for phase in HELD_PHASES},
        "pages": pages_by_owner(state),
        "prefix_cache": prefix_cache(state),
        "oldest_lane_s": oldest_lane_s(state, now),
    }


def oldest_lane_s(state: State, now: float) -> float:
    """Seconds since the last token of the lane that has waited longest for its next one; 0 without lanes."""
    last_s = (r.last_token_s for r in state.in_phase(Phase.LANE))
    return max((now - at_s for at_s in last_s if at_s is not None), default=0.0)


def pages_by_owner(state: State) -> dict[str, int]:
    """A page that several share counts for each of them."""
    active = state.active.values()
    return {
        "device_total": state.device.num_pages,
        "device_free": state.device.num_free,
        "device_cached": state.device.num_cached,
        "device_latency_sensitive": sum(len(r.device_pages) for r in active if not r.best_effort),
        "device_best_effort": sum(len(r.device_pages) for r in active if r.best_effort),
        "device_incoming": sum(len(r.incoming_pages) for r in active),
        "host_total": state.host.num_pages,
        "host_free": state.host.num_free,
        "host_cached": state.host.num_cached,
        "host_lanes": sum(len(r.host.pages) for r in active if r.host and r.host.slot is not None),
        "host_mirrors": sum(len(r.host.pages) for r in active if r.host and r.host.slot is None),
        "host_retiring": sum(len(s.pages) for s in state.retiring),
    }


def prefix_cache(state: State) -> dict[str, Any]:
    """Tokens queried and found, by class on the device and by lanes' pages on the host; pages evicted."""
    return {
        "device_latency_sensitive": asdict(state.latency_sensitive_hits),
        "device_best_effort": asdict(state.best_effort_hits),
        "host": asdict(state.host_hits),
        "device_evicted_pages": state.device.num_evicted,
        "host_evicted_pages": state.num_host_evicted,
    }


def host_facts(host: Host | None, state: State) -> dict[str, Any]:
    """The host process as it is now."""
    if host is None:
        return {"host_pid": None, "host_state": "none", "host_memory": {}, "host_warnings": []}
    is_up = "ready" if state.host_ready else "starting"
    return {
        "host_pid": host.pid,
        "host_state": "failed" if state.host_failed else is_up,
        "host_memory": host.segment.memory_usage(),
        "host_warnings": list(host.warnings),
    }
