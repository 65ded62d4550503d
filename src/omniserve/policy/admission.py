"""admit(...) -> Admission: whether a latency-sensitive request can have its targets without breaking
others'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from omniserve.policy.forecast import Forecast, at_half_way, fit_in_memory, forecast, prompt_of
from omniserve.policy.latency import Prediction
from omniserve.policy.request import Phase, Request
from omniserve.policy.slack import MOST_LENT_GAPS, tightest, tightest_tpot_s
from omniserve.policy.state import State
from omniserve.policy.terms import Terms

# Only walks correct a prediction. Where there was none for so long, one may be wrong by so much, and the
# longer, the more: a slow moment that is over, or a profile measured in one.
STALE_S, DOUBT, MOST_DOUBT = 10.0, 2.0, 8.0

Obstacle = Literal["ttft", "tpot", "others", "memory", "rows"]


@dataclass(frozen=True, slots=True)
class Admission:
    """The verdict. obstacle: what stands against it; None: admitted.

    "ttft" its own first token would be late; "tpot" with it, decoding alone would be too slow, or leave no
    room for its prefill; "others" the first token of one already admitted would be late; "memory" the device
    cannot hold all latency-sensitive texts to their expected ends; "rows" a walk cannot hold a row for each
    of them. predicted_ttft_s, target_ttft_s: from arrival. predicted_tpot_s: of everybody, the newcomer among
    them; target_tpot_s: the tightest of them. None without targets. prefill_walk_s: a walk that prefills
    takes at most so long.
    """

    obstacle: Obstacle | None = None
    predicted_ttft_s: float | None = None
    target_ttft_s: float | None = None
    predicted_tpot_s: float | None = None
    target_tpot_s: float | None = None
    prefill_walk_s: float = 0.0

    @property
    def is_accepted(self) -> bool:
        return self.obstacle is None

    @property
    def refuses_longer(self) -> bool:
        """Whether a request that differs in nothing but a longer prompt, whatever is cached of it, would be
        refused for sure.

        A longer prompt may be cut into other walks, and its first token come up to one of them sooner. Of
        others' first tokens nothing is sure.
        """
        if self.obstacle != "ttft":
            return self.obstacle in ("tpot", "memory", "rows")
        assert self.predicted_ttft_s is not None, "that is the obstacle"
        assert self.target_ttft_s is not None, "that is the obstacle"
        return self.predicted_ttft_s - self.prefill_walk_s > self.target_ttft_s


def admit(state: State, request: Request, now: float, model: Prediction, terms: Terms) -> Admission:
    """Decide on a request at its arrival, before it is part of the state. One without targets is admitted.

    Its `device_hashes`, where there are some, tell what of its prompt is cached.
    """
    slo = request.slo
    if slo is None:
        return Admission()
    running = list(state.in_class(Phase.DEVICE, best_effort=False))
    already = state.pending_chats()
    others = [*running, *already]
    pending = sorted([*already, request], key=lambda r: r.order)
    # Best-effort work gives way, so only latency-sensitive texts count.
    riding, own = at_half_way(state, others), at_half_way(state, [request])
    everyone = riding.with_decode(own.decode_context)
    # Nobody's gap bounds the first walks while nobody decodes.
    prefill_tpot_s = tightest_tpot_s([*running, *pending[:-1]])
    prompts = [prompt_of(state, r) for r in pending]
    most_rows = terms.max_num_batched_tokens
    stretch = 1.0 / (1.0 - terms.best_effort_share)
    ttft_stretch = stretch * state.promises.ttft.factor(now)
    index = next(i for i, one in enumerate(pending) if one is request)

    def is_late(ahead: Forecast) -> tuple[bool, bool]:
        """Whether its own first token would be late, and one behind it, because of it."""
        finish = [s * ttft_stretch for s in ahead.finish_s]
        ttft_s = now - request.arrival_s + finish[index]
        return ttft_s > slo.ttft_s, _breaks_others(pending, finish, index, now)

    def look(lent_s: float = 0.0) -> Forecast:
        return forecast(model, riding, prompts, prefill_tpot_s, most_rows, lent_s, in_the_mean=True)

    ahead = look()
    if any(is_late(ahead)):  # then running chats lend what they have in hand
        lent_s = tightest(running, MOST_LENT_GAPS)[0] - now
        ahead = look(lent_s)
    own_is_late, others_are_late = is_late(ahead)
    tpot_s = min(prefill_tpot_s, tightest_tpot_s(pending[-1:]))
    ttft = now - request.arrival_s + ahead.finish_s[index] * ttft_stretch
    # A TPOT is a mean, so no walk's margin is in it, but what was learned of those admitted before.
    tpot = model.walk_s(everyone, 0.0) * stretch * state.promises.tpot.factor(now)
    if not ahead.is_possible:  # beside the decodes not even one token of a prompt fits
        tpot = max(tpot, ahead.bound_s)
    doubt = _doubt(state, now)
    obstacles: dict[Obstacle, bool] = {
        "memory": bool(others) and not fit_in_memory(state, [*others, request]),
        "rows": len(others) + 1 > min(state.limits.max_num_seqs, most_rows),
        "tpot": not ahead.is_possible or tpot > doubt * tpot_s,
        "ttft": own_is_late and ttft > doubt * slo.ttft_s,
        "others": others_are_late,
    }
    obstacle = next((name for name, is_there in obstacles.items() if is_there), None)
    return Admission(obstacle, ttft, slo.ttft_s, tpot, tpot_s, ahead.bound_s * ttft_stretch)


def _doubt(state: State, now: float) -> float:
    """An idle engine that refuses everybody would never learn better: one that nobody else uses tries it."""
    if not state.is_idle:
        return 1.0
    idle_s = STALE_S if state.last_walk_s is None else now - state.last_walk_s
    return min(MOST_DOUBT, DOUBT * idle_s / STALE_S) if idle_s >= STALE_S else 1.0


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
