"""The paper's scheduler (arXiv 2603.12831, section 3.3), its misprints corrected and nothing else.

What differs from `omniserve`: the budget of a walk is the tightest TPOT target itself, not what is left of
it; the TTFT estimate of an arrival takes all pending prompts as one pass over the model, without time
already waited, the chunking that TPOT forces, memory, or anybody else's target; best-effort prefill always
comes before decode; while lanes exist both leave a constant share of the budget to them (omega, whose value
the paper does not give); lanes enter at the lowest layers first. Budgets are kept by the expected time of a
walk, without a margin. A best-effort request for which the device has no row becomes a lane at once, however
busy the host is, and comes back as soon as a row fits. A walk without latency-sensitive rows is bounded as
ours is, for the paper sets no bound. Leaves out: several hosts. Tunable: `OMEGA_SHARE`.
"""

from __future__ import annotations

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
# omega, as a share of the budget.
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
        predicted_s = _one_pass_s(state, request, self.model)
        is_late = predicted_s > request.slo.ttft_s
        return Admission("ttft" if is_late else None, predicted_s, request.slo.ttft_s)


def _one_pass_s(state: State, request: Request, model: Prediction) -> float:
    load = WalkLoad()
    for running in state.in_class(Phase.DEVICE, best_effort=False):
        load.add_decode(running.kv_tokens + 1)
    for one in (*state.pending_chats(), request):
        load.num_tokens += one.num_tokens - one.kv_tokens
        load.prefill_load += prefill_load(one.num_tokens, one.kv_tokens)
        load.num_chunks += 1
        load.chunk_context += one.num_tokens if one.kv_tokens else 0
        load.num_samples += 1
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
        targets = [(r.slo.tpot_s, r.id) for r in self.running if r.slo is not None]
        return min(targets, default=(float("inf"), None))

    def _spare_of_prompts(self, riding: WalkLoad) -> float:
        """The paper's "must not break the LS prefill SLO": seconds until the first of them is due."""
        due_s = min((r.due_s for r in self.pending if r.slo is not None), default=float("inf"))
        return due_s - self.now - self.model.walk_s(riding, self.busy)

    def _spare_of_newcomers(self) -> float:
        return float("inf")  # the paper keeps nothing for who is not here yet

    def best_effort_stages(self, load: WalkLoad) -> BestEffortStages:
        self._note_decodes(load)
        self._open_best_effort(load)
        return PREFILL_FIRST

    def _limit_s(self, use: str) -> float:
        has_results = self.host.num_lanes > 0
        reserve_s = OMEGA_SHARE * self.best_effort_s if has_results else 0.0
        return max(0.0, self.best_effort_s - reserve_s)

    def _split(self, rows: int, num_startable: int, waiting: Sequence[int]) -> list[int]:
        """Starts, then layer by layer; what a layer does not use goes to the next one in the walk itself."""
        shares = [min(rows, num_startable, self.terms.max_lane_rows)]
        rows -= shares[0]
        for _ in waiting:
            shares.append(min(rows, self.terms.max_lane_rows))
            rows -= shares[-1]
        return shares
