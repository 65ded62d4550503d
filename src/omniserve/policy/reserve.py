"""What best-effort work leaves to chats that are not here yet. docs/policy.md, "Newcomers".

Batch work stretches the walks of chats, as their targets allow. Then each chat is here longer, more are here
at once, and their rows leave less of each walk to the next prompts: a burst is refused that the device would
have borne alone. So best-effort work has of a walk only what likely newcomers can spare, were they here now.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from omniserve.policy.arrivals import Newcomers
from omniserve.policy.forecast import Prompt, at_half_way, forecast, prefill_load
from omniserve.policy.latency import Prediction
from omniserve.policy.request import Request
from omniserve.policy.slack import tightest_tpot_s
from omniserve.policy.state import State
from omniserve.policy.terms import Terms


def spare_of_newcomers(
    state: State,
    now: float,
    model: Prediction,
    terms: Terms,
    running: Sequence[Request],
    pending: Sequence[Request],
    prompts: Sequence[Prompt],
) -> float:
    """Seconds by which the first tokens of all newcomers could come later than forecast, were they admitted
    now; 0 when they would be refused, infinity when none are to be expected.

    running, pending: chats that decode and those that will, in line; prompts: of the latter. Judged as
    admission judges (admission.py), but for what running chats can lend: that stays for the burst that is
    larger than foreseen.
    """
    newcomers = list(state.arrivals.newcomers(now))
    if not newcomers:
        return math.inf
    load, pages = at_half_way(state, [*running, *pending])
    num_chats = len(running) + len(pending) + sum(n.count for n in newcomers)
    line = [(r.order, prompt, math.inf) for r, prompt in zip(pending, prompts, strict=True)]
    for group in newcomers:
        length, output = _lengths(state, group)
        for _ in range(group.count):
            load.add_decode(length + output // 2)
        pages += group.count * state.device.pages_for(length + output)
        line.append((group.order, _prompt_of(group, length), group.slo.ttft_s))
    tpot_s = min(tightest_tpot_s([*running, *pending]), *(n.slo.tpot_s for n in newcomers))
    limits, most_rows = state.limits, terms.max_num_batched_tokens
    stretch = 1.0 / (1.0 - terms.best_effort_share)
    is_refused = (
        pages > limits.num_device_pages
        or num_chats > min(limits.max_num_seqs, most_rows)
        or model.bound_s(load, 0.0) * stretch > tpot_s
    )
    if is_refused:
        return 0.0
    line.sort(key=lambda one: one[0])
    ahead = forecast(model, load, [prompt for _, prompt, _ in line], tpot_s, most_rows)
    spare_s = min(ttft_s - s * stretch for (_, _, ttft_s), s in zip(line, ahead.finish_s, strict=True))
    return max(0.0, spare_s) if ahead.is_possible else 0.0


def _lengths(state: State, group: Newcomers) -> tuple[int, int]:
    """Tokens of a prompt, cached ones included, and of an output of theirs."""
    return state.lengths.usual(group.service_class, -(-group.num_tokens // group.count))


def _prompt_of(group: Newcomers, length: int) -> Prompt:
    each = min(length, -(-group.num_tokens // group.count))
    load = group.count * prefill_load(length, length - each)
    return Prompt(group.num_tokens, load, length, count=group.count)
