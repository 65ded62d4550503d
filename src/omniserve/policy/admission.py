"""admit(...) -> Admission: whether a latency-sensitive request can have its targets without breaking
others'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import merge
from typing import Literal

from omniserve.policy.forecast import forecast
from omniserve.policy.latency import Prediction, WalkLoad
from omniserve.policy.request import Phase, Request
from omniserve.policy.slack import tightest_tpot_s
from omniserve.policy.state import State
from omniserve.policy.terms import Terms

Obstacle = Literal["ttft", "tpot", "others", "memory"]


@dataclass(frozen=True, slots=True)
class Admission:
    """The verdict. obstacle: what stands against it; None: admitted.

    "ttft" its own first token would be late; "tpot" with it, decoding alone would be too slow, or leave no
    room for its prefill; "others" the first token of one already admitted would be late; "memory" the device
    cannot hold all latency-sensitive texts to their expected ends. Seconds from arrival; None without
    targets.
    """

    obstacle: Obstacle | None = None
    predicted_ttft_s: float | None = None
    target_ttft_s: float | None = None

    @property
    def is_accepted(self) -> bool:
        return self.obstacle is None


def admit(
    state: State, request: Request, now: float, model: Prediction, terms: Terms, host_is_busy: float = 0.0
) -> Admission:
    """Decide on a request at its arrival, before it is part of the state. One without targets is admitted."""
    slo = request.slo
    if slo is None:
        return Admission()
    running = list(state.in_class(Phase.DEVICE, best_effort=False))
    parked = state.in_class(Phase.PREFILL, best_effort=False)
    waiting = state.in_class(Phase.WAITING, best_effort=False)
    pending = list(merge(parked, waiting, [request], key=lambda r: r.order))
    tpot_s = tightest_tpot_s([*running, *pending])
    everyone = _decode_load(state, [*running, *pending])
    riding = _decode_load(state, [*running, *(r for r in pending if r is not request)])
    # Nobody's gap bounds the first walks while nobody decodes.
    prefill_tpot_s = tightest_tpot_s([*running, *pending[:-1]])
    ahead = forecast(model, host_is_busy, riding, pending, prefill_tpot_s, terms.max_num_batched_tokens)
    stretch = 1.0 / (1.0 - terms.best_effort_share)
    finish = [s * stretch for s in ahead.finish_s]
    index = pending.index(request)
    predicted = now - request.arrival_s + finish[index]
    return Admission(
        _obstacle(
            predicted > slo.ttft_s,
            not ahead.is_possible or model.bound_s(everyone, host_is_busy) * stretch > tpot_s,
            _breaks_others(pending, finish, index, now),
            not _fits_memory(state, [*running, *pending]),
        ),
        predicted,
        slo.ttft_s,
    )


def _obstacle(ttft: bool, tpot: bool, others: bool, memory: bool) -> Obstacle | None:
    if memory:
        return "memory"
    if tpot:
        return "tpot"
    if ttft:
        return "ttft"
    return "others" if others else None


def _decode_load(state: State, requests: Sequence[Request]) -> WalkLoad:
    """A walk in which all of them decode, half way from here to their expected ends."""
    load = WalkLoad()
    for request in requests:
        left = state.lengths.expected_output(request) - request.num_out
        load.add_decode(request.num_tokens + left // 2)
    return load


def _breaks_others(pending: Sequence[Request], finish: Sequence[float], index: int, now: float) -> bool:
    """Whether one behind the newcomer is late because of it, who would not be late without it."""
    own_s = finish[index] - (finish[index - 1] if index else 0.0)
    for other, finish_s in zip(pending[index + 1 :], finish[index + 1 :], strict=True):
        if other.slo is None or other.first_token_s is not None:
            continue
        late_s = now + finish_s - other.due_s
        if 0.0 < late_s <= own_s:
            return True
    return False


def _fits_memory(state: State, requests: Sequence[Request]) -> bool:
    """Best-effort work gives way, so only latency-sensitive texts count, at their expected ends.

    One that could have the device to itself is not refused for what is expected of it alone.
    """
    pages = sum(state.device.pages_for(r.num_prompt + state.lengths.expected_output(r)) for r in requests)
    return pages <= state.limits.num_device_pages or len(requests) == 1
