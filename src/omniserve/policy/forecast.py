"""When pending prefills will end: many walks, each filled as far as the running decodes' TPOT allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from omniserve.policy.latency import Prediction, WalkLoad
from omniserve.policy.request import Request


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds from now until each pending prefill has its first token, in the order given.

    is_possible: false when the decodes' TPOT leaves no room for a token of prefill; `finish_s` then assumes
    one token a walk.
    """

    finish_s: tuple[float, ...]
    is_possible: bool


def prefill_load(request: Request) -> int:
    """Sum of context lengths over the tokens still to be prefilled."""
    done, total = request.kv_tokens, request.num_tokens
    return (total - done) * (total + done + 1) // 2


def forecast(
    model: Prediction,
    host_is_busy: float,
    decodes: WalkLoad,
    pending: Sequence[Request],
    tpot_s: float,
    max_tokens: int,
) -> Forecast:
    """Spread the pending prefills evenly over the fewest walks that keep `tpot_s` and `max_tokens`.

    decodes: rows that ride in every one of those walks.
    """
    tokens = [r.num_tokens - r.kv_tokens for r in pending]
    loads = [prefill_load(r) for r in pending]
    total, total_load = sum(tokens), sum(loads)
    if not total:
        return Forecast((), True)
    longest = max(r.num_tokens for r in pending)

    def walk(count: int) -> WalkLoad:
        load = decodes.copy()
        load.num_tokens += -(-total // count)
        load.prefill_load += -(-total_load // count)
        load.num_chunks += 1
        load.num_samples += 1
        load.chunk_context += longest if count > 1 else max(r.kv_tokens for r in pending)
        return load

    def fits(count: int) -> bool:
        load = walk(count)
        return load.num_tokens <= max_tokens and model.bound_s(load, host_is_busy) <= tpot_s

    count, is_possible = _fewest(total, fits)
    load = walk(count)
    walk_s = model.walk_s(load, host_is_busy)
    margin_s = model.bound_s(load, host_is_busy) - walk_s
    finish = []
    done = done_load = 0
    for own, own_load in zip(tokens, loads, strict=True):
        done, done_load = done + own, done_load + own_load
        share = max(done / total, done_load / total_load)
        finish.append(math.ceil(count * share - 1e-9) * walk_s + margin_s)
    return Forecast(tuple(finish), is_possible)


def _fewest(most: int, fits: Callable[[int], bool]) -> tuple[int, bool]:
    """The least count of 1..most that fits, where more always fit better; `most` and False when none does.

    Doubling first: the answer is mostly small.
    """
    low, high = 1, 1
    while not fits(high):
        if high == most:
            return most, False
        low, high = high + 1, min(most, 2 * high)
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return low, True
