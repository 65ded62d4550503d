"""The paper's scheduler (arXiv 2603.12831, section 3.3), with its misprints corrected.

What differs from `omniserve`: the budget of a walk is the tightest TPOT target of all chats itself, not what
is left of one; the TTFT estimate takes all pending prompts as one pass over the model, beside all who decode
and all who will, without time already waited, the chunking that TPOT forces, memory, or anybody else's
target, and best-effort work may make no pending prompt late by the same estimate; best-effort prefill always
comes before decode; omega, whose value the paper does not give, is a constant share of the TPOT target that
best-effort decodes always leave to lanes, and prefill while there are some; lanes enter at the lowest layers
first. Budgets are kept by the expected time of a walk, without a margin. A best-effort request for which the
device has no row becomes a lane at once, however busy the host is, and comes back as soon as a row fits.

Where the paper says nothing, or the engine cannot follow it, this is as ours: prompts of a class go in order
of due time, which is the paper's order of arrival while all have the same targets; times are of whole walks,
where the paper divides both sides by the layers; the planner does not see the host's output queue, so while
there are lanes it is taken to hold results; a walk of best-effort rows alone takes at most a quarter of the
tightest TTFT; an empty walk takes somebody, and a chunk of chat rides where decodes alone break the target;
who gives up memory, and when; starts of lanes, which count as rows; and a guaranteed share, which goes
before all this. Leaves out: several hosts, and communication, of which one device has none. Tunable:
`OMEGA_SHARE`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from omniserve.policy.admission import Admission
from omniserve.policy.budget import PREFILL_FIRST, BestEffortStages, Budget, Rules
from omniserve.policy.forecast import prefill_load
from omniserve.policy.latency import Prediction, WalkLoad
from omniserve.policy.request import Phase, Request
from omniserve.policy.slo import SloBudget, SloPolicy
from omniserve.policy.state import State

RULES = Rules("paper")
# omega, as a share of the TPOT target.
OMEGA_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class PaperPolicy(SloPolicy):
    """Targets held as the paper describes it."""

    rules: Rules = RULES

    def begin(self, state: State, now: float) -> Budget:
        return PaperBudget(self, state, now)

    def admit(self, state: State, request: Request, now: float) -> Admission:
        """One pass over the model for all pending prompts and this one must fit the TTFT target."""
        if request.slo is None:
            return Admission()
        predicted_s = _one_pass_s(state, (*state.pending_chats(), request), self.model)
        is_late = predicted_s > request.slo.ttft_s
        return Admission("ttft" if is_late else None, predicted_s, request.slo.ttft_s)


def _one_pass_s(state: State, pending: Sequence[Request], model: Prediction) -> float:
    """Seconds of one pass over the model that ends all these prompts. Each of them counts as a decode too,
    by what it has of its text now: g and c_DA of the paper's inequality take D and P alike."""
    load = WalkLoad()
    for running in state.in_class(Phase.DEVICE, best_effort=False):
        load.add_decode(running.kv_tokens + 1)
    for one in pending:
        load.num_tokens += one.num_tokens - one.kv_tokens
        load.prefill_load += prefill_load(one.num_tokens, one.kv_tokens)
        load.num_chunks += 1
        load.chunk_context += one.num_tokens if one.kv_tokens else 0
        load.num_samples += 1
        load.num_decodes += 1
        load.decode_context += one.kv_tokens + 1
    return model.walk_s(load, 0.0)


class PaperBudget(SloBudget):
    """Constant budgets, a constant reserve for lanes, lowest layers first."""

    def bound_s(self, load: WalkLoad) -> float:
        return self.model.walk_s(load, self.busy) if load.num_tokens or load.lane_rows else 0.0

    def goes_to_host(self, request: Request) -> bool:
        return True

    def host_gains(self) -> bool:
        return True

    def may_return(self, load: WalkLoad, lane: Request) -> bool:
        return self._fits_best_effort(load, lane.kv_tokens + 1)

    def _slack(self, lent_gaps: float) -> tuple[float, int | None]:
        """One constant, of the paper's one service: whether anybody decodes yet or not."""
        chats = (*self.running, *self.pending)
        targets = [(r.slo.tpot_s, r.id) for r in chats if r.slo is not None]
        return min(targets, default=(math.inf, None))

    def _spare_of_prompts(self, riding: WalkLoad) -> float:
        """The paper's "must not break the LS prefill SLO", by its own estimate of TTFT."""
        due_s = min((r.due_s for r in self.pending if r.slo is not None), default=math.inf)
        if due_s == math.inf:
            return math.inf
        return due_s - self.now - _one_pass_s(self.state, self.pending, self.model)

    @property
    def _tpot_s(self) -> float:
        """The tightest TPOT target; where nobody is here who has one, what bounds our walks."""
        return self.slack_s if math.isfinite(self.slack_s) else self.terms.walk_bound_s

    def _open_best_effort(self, load: WalkLoad) -> None:
        self.latency_sensitive_s = self.bound_s(load)
        allowed_s = min(self._tpot_s, self.latency_sensitive_s + max(0.0, self.spare_s))
        self.best_effort_s = max(allowed_s, self.latency_sensitive_s + self.state.best_effort_debt_s)

    def best_effort_stages(self, load: WalkLoad) -> BestEffortStages:
        self._note_decodes(load)
        self._open_best_effort(load)
        return PREFILL_FIRST

    def _limit_s(self, use: str) -> float:
        """Omega is always kept from decodes, and from prefill while results may be waiting."""
        if use == "prefill" and not self.host.num_lanes:
            return self.best_effort_s
        limit_s = min(self.best_effort_s, (1.0 - OMEGA_SHARE) * self._tpot_s)
        owed_s = self.state.best_effort_debt_s
        return max(limit_s, self.latency_sensitive_s + owed_s) if owed_s else limit_s

    def _split(self, rows: int, num_startable: int, waiting: Sequence[int]) -> list[int]:
        """Starts, then layer by layer; what a layer does not use goes to the next one in the walk itself."""
        shares = [min(rows, num_startable, self.terms.max_lane_rows)]
        rows -= shares[0]
        for _ in waiting:
            shares.append(min(rows, self.terms.max_lane_rows))
            rows -= shares[-1]
        return shares
