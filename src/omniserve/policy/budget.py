"""The seam between the scheduler and what a plan may cost.

A `Policy` makes a `Budget` for each plan; the planner asks that how much still fits. `FixedBudget` answers
with constants and promises no SLO; `SloPolicy` (slo.py) answers from targets and predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from omniserve.policy.admission import Admission
from omniserve.policy.explanation import Explanation, LeftOut
from omniserve.policy.latency import WalkLoad
from omniserve.policy.request import Request
from omniserve.policy.state import State

Stage = Literal["ls_decode", "ls_prefill", "best_effort", "be_prefill", "be_decode", "running", "waiting"]
BestEffortStages = tuple[Stage, Stage]
PREFILL_FIRST: BestEffortStages = ("be_prefill", "be_decode")


@dataclass(frozen=True, slots=True)
class Rules:
    """What a policy does, budget aside.

    stages          order of service. "best_effort" stands for be_prefill and be_decode in the order that the
                    budget chooses; "running" for every started request in line, "waiting" for those not
                    started.
    uses_host       whether best-effort work may decode on the host.
    start_evicts    a waiting latency-sensitive request may take the place of best-effort ones.
    keeps_headroom  best-effort work starts only above the watermark of device pages.
    takes_best_effort
                    whether best-effort requests are served at all.
    """

    name: str
    stages: tuple[Stage, ...] = ("ls_decode", "ls_prefill", "best_effort")
    uses_host: bool = True
    start_evicts: bool = True
    keeps_headroom: bool = True
    takes_best_effort: bool = True


@dataclass(frozen=True, slots=True)
class LaneShare:
    """Lane rows of one walk: lanes that may start a token, rows that may enter at each layer."""

    starts: int
    caps: tuple[int, ...]


class Budget(Protocol):
    """What one plan may cost. Answers depend on the arguments and on the state it was made for."""

    def chunk_tokens(self, load: WalkLoad, start: int, remaining: int, best_effort: bool) -> int:
        """Most prompt tokens (0..remaining) from position `start` that the walk can still take."""
        ...

    def fits_decode(self, load: WalkLoad, context: int, best_effort: bool) -> bool:
        """Whether one more decode row with `context` tokens can ride."""
        ...

    def best_effort_stages(self, load: WalkLoad) -> BestEffortStages:
        """Asked once latency-sensitive work has its rows: who goes first with what is left."""
        ...

    def goes_to_host(self, request: Request) -> bool:
        """Asked of a best-effort request without a row in this walk: whether it shall become a lane now."""
        ...

    def host_gains(self) -> bool:
        """Whether another lane would yield tokens: false where the host has no bandwidth left for it."""
        ...

    def may_return(self, load: WalkLoad, lane: Request) -> bool:
        """Whether a lane would have a row on the device, now and for a while."""
        ...

    def copies(self, load: WalkLoad, most: int) -> int:
        """Pages (0..most) that may be copied: the device waits while they leave it."""
        ...

    def share_lanes(self, load: WalkLoad, num_startable: int) -> LaneShare:
        """What lanes get of the walk; `num_startable` could begin a token."""
        ...

    def pass_budget_s(self) -> float:
        """Seconds that lane passes may run before the engine looks up again."""
        ...

    def close(
        self, load: WalkLoad, lanes: LaneShare | None, best_effort_rows: bool, left_out: Sequence[LeftOut]
    ) -> tuple[Explanation | None, float]:
        """The plan is made (lanes: None for passes): why it is as it is, and what is owed to best-effort work
        after it (seconds)."""
        ...


class Policy(Protocol):
    """Rules, and a budget for each plan. Holds no state but what a prediction learns."""

    @property
    def rules(self) -> Rules: ...

    @property
    def promises_slo(self) -> bool: ...

    def begin(self, state: State, now: float) -> Budget:
        """The budget of a plan made at `now`."""
        ...

    def admit(self, state: State, request: Request, now: float) -> Admission:
        """Whether a request that arrives `now`, not yet part of the state, can have its targets."""
        ...


OMNISERVE = Rules("omniserve")


@dataclass(frozen=True, slots=True)
class FixedBudget:
    """Constants instead of a model: `max_num_batched_tokens` and `max_lane_rows`. Promises no SLO."""

    max_num_batched_tokens: int
    max_lane_rows: int
    pass_budget_seconds: float = 0.05
    rules: Rules = OMNISERVE

    @property
    def promises_slo(self) -> bool:
        return False

    def begin(self, state: State, now: float) -> Budget:
        return _FixedPlan(self, state)

    def admit(self, state: State, request: Request, now: float) -> Admission:
        return Admission()

    def under(self, rules: Rules) -> FixedBudget:
        """The same constants for another policy."""
        return replace(self, rules=rules)


@dataclass(frozen=True, slots=True)
class _FixedPlan:
    budget: FixedBudget
    state: State

    def chunk_tokens(self, load: WalkLoad, start: int, remaining: int, best_effort: bool) -> int:
        return max(0, min(remaining, self.budget.max_num_batched_tokens - load.num_tokens))

    def fits_decode(self, load: WalkLoad, context: int, best_effort: bool) -> bool:
        return load.num_tokens < self.budget.max_num_batched_tokens

    def best_effort_stages(self, load: WalkLoad) -> BestEffortStages:
        return PREFILL_FIRST

    def goes_to_host(self, request: Request) -> bool:
        return True

    def host_gains(self) -> bool:
        return True

    def may_return(self, load: WalkLoad, lane: Request) -> bool:
        return self.fits_decode(load, lane.kv_tokens + 1, best_effort=True)

    def copies(self, load: WalkLoad, most: int) -> int:
        return most

    def share_lanes(self, load: WalkLoad, num_startable: int) -> LaneShare:
        rows = self.budget.max_lane_rows
        return LaneShare(rows, (rows,) * self.state.limits.num_layers)

    def pass_budget_s(self) -> float:
        return self.budget.pass_budget_seconds

    def close(
        self, load: WalkLoad, lanes: LaneShare | None, best_effort_rows: bool, left_out: Sequence[LeftOut]
    ) -> tuple[Explanation | None, float]:
        return None, 0.0
