"""When pending prefills will end: many walks, each filled as far as the running decodes' TPOT allows.

Beside an idle host, whatever it does now: a prompt that has no time to spare leaves best-effort work no rows,
and lanes without rows have nothing to attend to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from omniserve.policy.latency import Prediction, WalkLoad
from omniserve.policy.request import Request
from omniserve.policy.state import State


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be computed of one prompt, or of `count` alike together.

    num_tokens: not computed yet; prefill_load: the sum of their context lengths. length: of the whole text.
    """

    num_tokens: int
    prefill_load: int
    length: int
    is_begun: bool = False
    count: int = 1


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds from now until each pending prompt has its first token, in the order given.

    is_possible: false when the decodes' TPOT leaves no room for a token of prefill; `finish_s` then assumes
    one token a walk. bound_s: of each of the walks, with margin; 0 when nothing is pending.
    """

    finish_s: tuple[float, ...]
    is_possible: bool
    bound_s: float


def prefill_load(num_tokens: int, done: int) -> int:
    """Sum of context lengths over the tokens of a text to be prefilled after the first `done`."""
    return (num_tokens - done) * (num_tokens + done + 1) // 2


def prompt_of(state: State, request: Request) -> Prompt:
    """What is to be computed of a pending request, or of one that is about to be."""
    done = state.tokens_done(request)
    load = prefill_load(request.num_tokens, done)
    return Prompt(request.num_tokens - done, load, request.num_tokens, done > 0)


def at_half_way(state: State, requests: Iterable[Request]) -> WalkLoad:
    """A walk in which all of them decode, half way from here to their expected ends."""
    load = WalkLoad()
    for request in requests:
        load.add_decode(request.num_tokens + (state.lengths.expected_output(request) - request.num_out) // 2)
    return load


def final_pages(state: State, requests: Iterable[Request]) -> int:
    """Device pages that they hold at their expected ends, all together."""
    expected = state.lengths.expected_output
    return sum(state.device.pages_for(r.num_prompt + expected(r)) for r in requests)


def fit_in_memory(state: State, requests: Sequence[Request]) -> bool:
    """Whether the device's pages hold them while all grow by a token a walk and end as expected.

    Whoever has outlived, or nearly, what was expected is taken to go on for half a usual text.
    """
    page_size, num_pages = state.limits.page_size, state.limits.num_device_pages
    half = {name: state.lengths.usual(name, 1)[1] // 2 for name in {r.service_class for r in requests}}
    texts = []
    for r in requests:
        out = r.num_out
        more = min(r.max_tokens - out, half[r.service_class])
        texts.append((r.num_tokens, max(state.lengths.expected_output(r) - out, more)))
    if sum([-(-(there + to_come) // page_size) for there, to_come in texts]) <= num_pages:
        return True  # all at their ends at once: mostly there is room for that
    most = tokens = count = 0
    for there, to_come in sorted(texts, key=lambda text: -text[1]):
        tokens, count = tokens + there, count + 1  # when this one ends, those before it are there still
        most = max(most, tokens + count * (to_come + page_size - 1))
    return most // page_size <= num_pages


def forecast(
    model: Prediction,
    decodes: WalkLoad,
    prompts: Sequence[Prompt],
    tpot_s: float,
    max_tokens: int,
    lent_s: float = 0.0,
    in_the_mean: bool = False,
) -> Forecast:
    """Spread the pending prompts evenly over the fewest walks that keep `tpot_s` and `max_tokens`.

    decodes: rows that ride in every one of those walks. lent_s: what the first walk may take, where that is
    more: together they may take so much longer. in_the_mean: walks keep `tpot_s` by their expected time, not
    by their bound: a chat's TPOT is a mean, and what one walk takes too long another makes good.
    """
    total, total_load = sum(p.num_tokens for p in prompts), sum(p.prefill_load for p in prompts)
    if not total:
        return Forecast((), True, 0.0)
    num_prompts = sum(p.count for p in prompts)
    longest = max(p.length for p in prompts)
    begun = sum(p.length for p in prompts if p.is_begun)

    def walk(count: int) -> WalkLoad:
        load = decodes.copy()
        load.num_tokens += -(-total // count)
        load.prefill_load += -(-total_load // count)
        load.num_chunks += 1 + -(-(num_prompts - 1) // count)
        load.num_samples += -(-num_prompts // count)
        # Earlier KV is read for prompts begun before; in several walks for one that goes on, too.
        load.chunk_context += begun if count == 1 else max(longest, -(-begun // count))
        return load

    seconds_of = model.walk_s if in_the_mean else model.bound_s
    more_s = 0.0
    if lent_s > tpot_s:
        fullest = walk(-(-total // max(1, max_tokens - decodes.num_tokens)))
        # By its bound the first walk keeps what is lent.
        lent_s *= seconds_of(fullest, 0.0) / model.bound_s(fullest, 0.0)
        more_s = max(0.0, min(lent_s, seconds_of(fullest, 0.0)) - tpot_s)

    def fits(count: int) -> bool:
        load = walk(count)
        return load.num_tokens <= max_tokens and seconds_of(load, 0.0) <= tpot_s + more_s / count

    count, is_possible = _fewest(total, fits)
    load = walk(count)
    walk_s = model.walk_s(load, 0.0)
    bound_s = model.bound_s(load, 0.0)
    finish = []
    upto = upto_load = 0
    for prompt in prompts:
        upto, upto_load = upto + prompt.num_tokens, upto_load + prompt.prefill_load
        share = max(upto / total, upto_load / total_load)
        finish.append(math.ceil(count * share - 1e-9) * walk_s + (bound_s - walk_s))
    return Forecast(tuple(finish), is_possible, bound_s)


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
