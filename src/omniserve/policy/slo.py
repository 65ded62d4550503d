"""SloPolicy: budgets from targets and predictions. docs/policy.md derives every formula.

A walk may take as long as the tightest target of a running decode leaves (slack). Best-effort work may use of
that what waiting prompts can spare, and never so much that an arrival meets a long walk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from omniserve.policy.admission import Admission, admit
from omniserve.policy.budget import OMNISERVE, BestEffortStages, Budget, LaneShare, Rules
from omniserve.policy.division import Values, split_rows, value_uses
from omniserve.policy.explanation import Explanation, LeftOut
from omniserve.policy.forecast import forecast, prompt_of
from omniserve.policy.host_outlook import HostOutlook
from omniserve.policy.latency import Prediction, WalkLoad
from omniserve.policy.request import Phase, Request
from omniserve.policy.reserve import Chats, spare_of_newcomers
from omniserve.policy.slack import MOST_LENT_GAPS, tightest, tightest_tpot_s
from omniserve.policy.state import State
from omniserve.policy.terms import Terms

# Tokens of a chunk that runs where no budget would let it, so that everybody comes to an end.
LEAST_CHUNK = 16
# A budget of passes that one pass begins within, however long it takes: lanes always come on.
ONE_PASS_S = 0.001


@dataclass(frozen=True, slots=True)
class SloPolicy:
    """Targets held by a prediction. `rules` are omniserve's own."""

    model: Prediction
    terms: Terms
    rules: Rules = OMNISERVE

    @property
    def promises_slo(self) -> bool:
        return True

    def begin(self, state: State, now: float) -> Budget:
        return SloBudget(self, state, now)

    def admit(self, state: State, request: Request, now: float) -> Admission:
        return admit(state, request, now, self.model, self.terms)


class SloBudget:
    """The budget of one plan. Seconds from `now` on."""

    def __init__(self, policy: SloPolicy, state: State, now: float) -> None:
        self.model, self.terms, self.rules = policy.model, policy.terms, policy.rules
        self.state, self.now, self.num_layers = state, now, state.limits.num_layers
        self.running = list(state.in_class(Phase.DEVICE, best_effort=False))
        self.pending = state.pending_chats()
        self.prompts = [prompt_of(state, request) for request in self.pending]
        self.host = HostOutlook(state, self.model, self.terms)
        self.busy = self.host.busy
        riding = WalkLoad()
        for request in self.running:
            riding.add_decode(request.kv_tokens + 1)
        self.slack_s, self.tightest = self._slack(self._gap_with_margin(riding))
        self.spare_s = self._spare_of_prompts(riding)
        self.chunk_slack_s = self.slack_s
        if self.spare_s < 0.0:
            lent = self._slack(MOST_LENT_GAPS)
            self.chunk_slack_s, self.tightest = max((self.slack_s, self.tightest), lent, key=itemgetter(0))
        self.newcomers_spare_s = math.inf  # not asked yet
        self.forced_s = 0.0  # what had to be done whatever it takes
        self.latency_sensitive_s = 0.0
        self.best_effort_s = min(self.slack_s, self.terms.walk_bound_s)
        self.values: Values | None = None
        self.lane_reserve_s = 0.0

    def _slack(self, lent_gaps: float) -> tuple[float, int | None]:
        due_s, request_id = tightest(self.running, lent_gaps)
        return due_s - self.now, request_id

    def _gap_with_margin(self, riding: WalkLoad) -> float:
        """Gaps until a token is due whose request is ahead of its mean: walks are bounded with a margin, and
        one that is expected to take a gap may come out longer when there is time in hand for that."""
        expected_s = self.model.walk_s(riding, self.busy) if riding.num_tokens else 0.0
        return self.bound_s(riding) / expected_s if expected_s > 0.0 else 1.0

    def _spare_of_prompts(self, riding: WalkLoad) -> float:
        """Seconds by which the first tokens of all pending prompts could come later than forecast."""
        if not any(r.slo is not None for r in self.pending):
            return math.inf
        tpot_s = tightest_tpot_s([*self.running, *self.pending[:-1]])
        ahead = forecast(self.model, riding, self.prompts, tpot_s, self.terms.max_num_batched_tokens)
        return min(
            tightest([r])[0] - self.now - finish_s
            for r, finish_s in zip(self.pending, ahead.finish_s, strict=True)
        )

    def _spare_of_newcomers(self) -> float:
        chats = Chats(self.running, self.pending, self.prompts)
        return spare_of_newcomers(self.state, self.now, self.model, self.terms, chats)

    # ------------------------------------------------------------ device rows

    def bound_s(self, load: WalkLoad) -> float:
        return self.model.bound_s(load, self.busy) if load.num_tokens or load.lane_rows else 0.0

    def chunk_tokens(self, load: WalkLoad, start: int, remaining: int, best_effort: bool) -> int:
        rows_left = self.terms.max_num_batched_tokens - load.num_tokens
        most = min(remaining, rows_left if best_effort else rows_left - self._owed_rows())
        if most <= 0:
            return 0
        if not best_effort:
            self._note_decodes(load)
        limit_s = self._limit_s("prefill") if best_effort else self.chunk_slack_s

        def fits(count: int) -> bool:
            return self.bound_s(load.with_chunk(start, count, count == remaining)) <= limit_s

        count = most if fits(most) else _most(most - 1, fits)
        if count == 0 and self._must_go_on(load, best_effort):
            count = min(most, LEAST_CHUNK)
            self.forced_s = self.bound_s(load.with_chunk(start, count, count == remaining))
        return count

    def _owed_rows(self) -> int:
        """Rows that chunks of chat leave free where something is owed: time is of no use without them."""
        return LEAST_CHUNK if self.state.best_effort_debt_s > 0.0 and self._has_best_effort() else 0

    def _has_best_effort(self) -> bool:
        return any(self.state.first_best_effort(phase) for phase in Phase)

    def _must_go_on(self, load: WalkLoad, best_effort: bool) -> bool:
        """An empty walk takes somebody; where decodes alone break their target, a chunk breaks no more."""
        is_lost = not best_effort and not load.num_chunks and self.bound_s(load) > self.chunk_slack_s
        return load.num_tokens == 0 or is_lost

    def fits_decode(self, load: WalkLoad, context: int, best_effort: bool) -> bool:
        if load.num_tokens >= self.terms.max_num_batched_tokens:
            return False
        if not best_effort:
            return True
        bound_s = self.bound_s(load.with_decode(context))
        if bound_s <= self._limit_s("decode"):
            return True
        if load.num_tokens == 0:
            self.forced_s = bound_s
        return load.num_tokens == 0

    def _note_decodes(self, load: WalkLoad) -> None:
        """Decodes of chat ride whatever they take. Asked when nothing else rides yet, and then again."""
        if not load.num_chunks:
            self.forced_s = self.bound_s(load)

    # ------------------------------------------------------------ division of what is left

    def best_effort_stages(self, load: WalkLoad) -> BestEffortStages:
        self._note_decodes(load)
        self._open_best_effort(load)
        first = self.state.first_best_effort(Phase.PREFILL) or self.state.first_best_effort(Phase.WAITING)
        self.values = value_uses(
            self.model,
            self.busy,
            load,
            self.num_layers,
            decode_context=self._decode_context(first),
            outputs_per_prompt_token=self.state.lengths.outputs_per_prompt_token(first) if first else 0.0,
            free_share=self.host.free_share(self._shared_walk_s),
            open_s=self.best_effort_s - self.latency_sensitive_s,
            decoded_per_walk=self.host.decoded_per_walk(),
        )
        self.lane_reserve_s = self._lane_reserve_s(load)
        return self.values.stages

    def _open_best_effort(self, load: WalkLoad) -> None:
        """From here on rows are best-effort: what they may use, and what they are owed."""
        self.latency_sensitive_s = self.bound_s(load)
        spare_s = self.latency_sensitive_s + max(0.0, self.spare_s)
        wait_s = self.latency_sensitive_s + self._wait_left_s()
        allowed_s = min(self.slack_s, self.terms.walk_bound_s, spare_s, wait_s)
        if self._has_best_effort() and allowed_s > self.latency_sensitive_s:
            self.newcomers_spare_s = self._spare_of_newcomers()
            allowed_s = min(allowed_s, self.latency_sensitive_s + self.newcomers_spare_s)
        owed_s = self.state.best_effort_debt_s
        self.best_effort_s = max(allowed_s, self.latency_sensitive_s + owed_s)

    def _wait_left_s(self) -> float:
        """Of the longest walk that an arrival may meet, what none of those pending has waited before its
        first one: the walk under way when it came and the batch rows of its own are no longer together."""
        waited_s = (
            (self.now if r.started_s is None else r.started_s) - r.arrival_s
            for r in self.pending
            if r.slo is not None
        )
        return max(0.0, self.terms.walk_bound_s - max(waited_s, default=-math.inf))

    def _decode_context(self, first: Request | None) -> int:
        decoding = list(self.state.in_class(Phase.DEVICE, best_effort=True))
        if decoding:
            return sum(r.kv_tokens + 1 for r in decoding) // len(decoding)
        return first.num_tokens if first is not None else 1

    @property
    def _shared_walk_s(self) -> float:
        """How long a walk with best-effort rows is at most."""
        return max(self.latency_sensitive_s, min(self.best_effort_s, self.terms.walk_bound_s))

    def _lane_reserve_s(self, load: WalkLoad) -> float:
        """What the rows that lanes can be expected to bring would add to the walk."""
        rows = self.host.expected_rows()
        if not rows:
            return 0.0
        return max(0.0, self.bound_s(load.with_lane_rows(rows, self.num_layers)) - self.bound_s(load))

    def _limit_s(self, use: str) -> float:
        """Budget of a use: one worth less than lane rows leaves them their part."""
        if self.values is None or getattr(self.values, use) >= self.values.lane:
            return self.best_effort_s
        return self.best_effort_s - self.lane_reserve_s

    # ------------------------------------------------------------ placement

    def goes_to_host(self, request: Request) -> bool:
        """Whether it has waited for a row as long as moving and a lane token would take.

        Moving at once would copy for every short squeeze; never, would wait for ever. Waiting as long as the
        move costs is at most twice as long as the best choice would have been.
        """
        if not self.host_gains():
            return False
        waited_s = self.now - (request.last_token_s if request.last_token_s is not None else self.now)
        return waited_s > self.host.move_s(request, self.latency_sensitive_s)

    def _fits_best_effort(self, load: WalkLoad, context: int) -> bool:
        if load.num_tokens >= self.terms.max_num_batched_tokens:
            return False
        return self.bound_s(load.with_decode(context)) <= self._limit_s("decode")

    def host_gains(self) -> bool:
        return self.host.gains(self._shared_walk_s)

    def may_return(self, load: WalkLoad, lane: Request) -> bool:
        """A row like it must fit twice, and its last move must have paid: what comes back shall stay."""
        if lane.has_just_moved:
            return False
        return self._fits_best_effort(load.with_decode(lane.kv_tokens + 1), lane.kv_tokens + 1)

    # ------------------------------------------------------------ lanes

    def copies(self, load: WalkLoad, most: int) -> int:
        """As many as the limit of best-effort work takes; all of them when no row waits."""
        page_size = self.state.limits.page_size

        def fits(count: int) -> bool:
            more = load.copy()
            more.copied_tokens += count * page_size
            return self.bound_s(more) <= self.best_effort_s

        return most if not load.num_tokens or fits(most) else _most(most - 1, fits)

    def share_lanes(self, load: WalkLoad, num_startable: int) -> LaneShare:
        if not self.host.num_lanes or not load.num_tokens:
            return LaneShare(num_startable, (0,) * self.num_layers)
        rows = self._lane_rows(load)
        waiting = self.state.lanes_waiting or (0,) * self.num_layers
        shares = self._split(rows, num_startable, waiting)
        return LaneShare(shares[0], tuple(shares[1:]))

    def _lane_rows(self, load: WalkLoad) -> int:
        """Most lane rows, over all layers, that the rest of the budget takes: one slack, shared."""

        def fits(count: int) -> bool:
            return self.bound_s(load.with_lane_rows(count, self.num_layers)) <= self.best_effort_s

        most = self.terms.max_lane_rows * (self.num_layers + 1)
        return most if fits(most) else _most(most - 1, fits)

    def _split(self, rows: int, num_startable: int, waiting: Sequence[int]) -> list[int]:
        """Starts first, then a cap a layer, in proportion to who waits where."""
        most = self.terms.max_lane_rows
        limits = (min(num_startable, most), *[most] * len(waiting))
        return split_rows(rows, (num_startable, *waiting), limits)

    def pass_budget_s(self) -> float:
        """What lies between now and the next look, less the pass that may begin just before it."""
        most_s = min(self.terms.pass_budget_s, self.slack_s, self.terms.walk_bound_s)
        return max(ONE_PASS_S, most_s - self.model.pass_s(self.terms.max_lane_rows, self.busy))

    # ------------------------------------------------------------ the end of the plan

    def close(
        self, load: WalkLoad, lanes: LaneShare | None, best_effort_rows: bool, left_out: Sequence[LeftOut]
    ) -> tuple[Explanation, float]:
        lane_rows = lanes.starts + sum(lanes.caps) if lanes is not None and self.host.num_lanes else 0
        whole = load.with_lane_rows(lane_rows, self.num_layers)
        bound_s = self.bound_s(whole)
        is_shared = best_effort_rows or lane_rows or load.copied_tokens
        allowed_s = (
            self.best_effort_s if is_shared else self.chunk_slack_s if load.num_chunks else self.slack_s
        )
        explanation = Explanation(
            policy=self.rules.name,
            slack_s=_finite(self.chunk_slack_s),
            tightest=self.tightest,
            budget_s=_finite(max(allowed_s, self.forced_s)),
            latency_sensitive_s=self.latency_sensitive_s,
            best_effort_s=self.best_effort_s,
            newcomers_spare_s=_finite(self.newcomers_spare_s),
            predicted_s=self.model.walk_s(whole, self.busy) if lanes is not None else 0.0,
            bound_s=bound_s if lanes is not None else 0.0,
            host_is_busy=self.busy,
            load=whole,
            values=self.values.best_first() if self.values is not None else (),
            left_out=tuple(left_out),
        )
        return explanation, self._debt_s(load, lane_rows if lanes is not None else None)

    def _debt_s(self, load: WalkLoad, lane_rows: int | None) -> float:
        """Owed after a walk with so many lane rows at most: the guaranteed share of its time, less what
        best-effort work had of it. Passes (None) change nothing, for nobody else had that time."""
        share = self.terms.best_effort_share
        if not share or not self._has_best_effort():
            return 0.0
        if lane_rows is None:
            return self.state.best_effort_debt_s
        # Caps are for all that could come. What is paid with is what does come, as far as one can foresee.
        likely_rows = min(lane_rows, math.ceil(self.state.lane_rows_per_walk))
        bound_s = self.bound_s(load.with_lane_rows(likely_rows, self.num_layers))
        had_s = bound_s - self.latency_sensitive_s
        owed_s = self.state.best_effort_debt_s + share * bound_s - had_s
        return min(max(0.0, owed_s), self.terms.walk_bound_s)


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def _most(high: int, fits: Callable[[int], bool]) -> int:
    """The greatest count of 0..high that fits, where more never fits better; 0 needs no asking."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
