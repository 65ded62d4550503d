"""What best-effort work leaves to chats that are not here yet. docs/policy.md, "Newcomers".

Batch work stretches the walks of chats, as their targets allow. Then each chat is here longer, more are here
at once, and their rows leave less of each walk to the next prompts: a burst is refused that the device would
have borne alone. So best-effort work has of a walk only what likely newcomers can spare, were they here now.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from omniserve.policy.arrivals import Newcomers
from omniserve.policy.forecast import Prompt, at_half_way, final_pages, forecast, prefill_load
from omniserve.policy.latency import Prediction, WalkLoad
from omniserve.policy.request import Request
from omniserve.policy.slack import tightest_tpot_s
from omniserve.policy.state import State
from omniserve.policy.terms import Terms


@dataclass(frozen=True, slots=True)
class Chats:
    """Those that are here: who decodes, and who waits for its first token, in line, with its prompt."""

    running: Sequence[Request]
    pending: Sequence[Request]
    prompts: Sequence[Prompt]


NOBODY = Chats((), (), ())


def spare_of_newcomers(state: State, now: float, model: Prediction, terms: Terms, chats: Chats) -> float:
    """Seconds by which the first tokens of all newcomers could come later than forecast, were they admitted
    now; 0 when they would be refused, infinity when none are to be expected.

    Judged as admission judges (admission.py), and more strictly: walks keep TPOT by their bound, memory holds
    all texts to their ends, and running chats lend nothing, which stays for the burst that is larger than
    foreseen. Of a burst that an idle device could not serve in time either, only the part that it could.
    """
    newcomers = tuple(state.arrivals.newcomers(now))
    if not newcomers:
        return math.inf
    outlook = _Outlook(state, model, terms)
    spare_s = outlook.spare_s(chats, newcomers)
    if spare_s < terms.walk_bound_s:
        part = outlook.servable(newcomers)
        if part is not newcomers:
            spare_s = outlook.spare_s(chats, part)
    return max(0.0, spare_s)


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What would become of newcomers beside some chats or none."""

    state: State
    model: Prediction
    terms: Terms

    def servable(self, newcomers: tuple[Newcomers, ...]) -> tuple[Newcomers, ...]:
        """As many of them as a device with nothing else to do serves in time, after the longest walk that
        they may meet (`walk_bound_s`): so many of each class at most, none of one that it could not serve.
        """

        def fits(part: Sequence[Newcomers]) -> bool:
            return self.spare_s(NOBODY, part) >= self.terms.walk_bound_s

        if fits(newcomers):
            return newcomers
        alone = [n for n in newcomers if fits([n.first(1)])]
        low, high = 0, max((n.count for n in alone), default=0)
        while low < high:
            middle = (low + high + 1) // 2
            if fits([n.first(middle) for n in alone]):
                low = middle
            else:
                high = middle - 1
        return tuple(n.first(low) for n in alone) if low else ()

    def spare_s(self, chats: Chats, newcomers: Sequence[Newcomers]) -> float:
        """Below zero when some are late or refused; infinity for none."""
        if not newcomers:
            return math.inf
        here = [*chats.running, *chats.pending]
        load, pages = at_half_way(self.state, here), final_pages(self.state, here)
        line = [(r.order, prompt, math.inf) for r, prompt in zip(chats.pending, chats.prompts, strict=True)]
        for group in newcomers:
            length, output = _lengths(self.state, group)
            load.add_decodes(group.count, length + output // 2)
            pages += group.count * self.state.device.pages_for(length + output)
            line.append((group.order, _prompt_of(group, length), group.slo.ttft_s))
        tpot_s = min(tightest_tpot_s(here), *(n.slo.tpot_s for n in newcomers))
        stretch = 1.0 / (1.0 - self.terms.best_effort_share)
        if self._is_refused(load, pages, tpot_s / stretch):
            return -math.inf
        line.sort(key=lambda one: one[0])
        prompts = [prompt for _, prompt, _ in line]
        ahead = forecast(self.model, load, prompts, tpot_s, self.terms.max_num_batched_tokens)
        spare_s = [ttft_s - s * stretch for (_, _, ttft_s), s in zip(line, ahead.finish_s, strict=True)]
        return min(spare_s) if ahead.is_possible else -math.inf

    def _is_refused(self, everyone: WalkLoad, pages: int, tpot_s: float) -> bool:
        limits = self.state.limits
        return (
            pages > limits.num_device_pages
            or everyone.num_decodes > min(limits.max_num_seqs, self.terms.max_num_batched_tokens)
            or self.model.bound_s(everyone, 0.0) > tpot_s
        )


def _lengths(state: State, group: Newcomers) -> tuple[int, int]:
    """Tokens of a prompt, cached ones included, and of an output of theirs."""
    return state.lengths.usual(group.service_class, -(-group.num_tokens // group.count))


def _prompt_of(group: Newcomers, length: int) -> Prompt:
    each = min(length, -(-group.num_tokens // group.count))
    load = group.count * prefill_load(length, length - each)
    return Prompt(group.num_tokens, load, length, count=group.count)
