"""Who gets the slack that is left to best-effort work: the uses by their tokens per second of device time.

A use's rate is marginal: what a few more rows of it add to the walk at hand. docs/policy.md, "Division of
slack".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omniserve.policy.budget import PREFILL_FIRST, BestEffortStages
from omniserve.policy.latency import Prediction, WalkLoad

# Rows over which a marginal cost is taken: the cost of dense work is a staircase, one row often costs
# nothing.
PROBE_ROWS = 16
LEAST_S = 1e-9


@dataclass(frozen=True, slots=True)
class Values:
    """Best-effort tokens per second of device time. A lane token takes a row at each of the layers."""

    prefill: float
    decode: float
    lane: float

    def best_first(self) -> tuple[tuple[str, float], ...]:
        named = (("prefill", self.prefill), ("decode", self.decode), ("lane", self.lane))
        return tuple(sorted(named, key=lambda pair: -pair[1]))

    @property
    def stages(self) -> BestEffortStages:
        return PREFILL_FIRST if self.prefill >= self.decode else ("be_decode", "be_prefill")


def value_uses(
    model: Prediction,
    host_is_busy: float,
    load: WalkLoad,
    num_layers: int,
    decode_context: int,
    outputs_per_prompt_token: float,
    free_share: float,
    open_s: float,
    decoded_per_walk: float,
) -> Values:
    """Rates of the three uses in a walk that holds `load` already.

    free_share: of the capacity to decode what is prefilled, the part not in use, 0 to 1. open_s: seconds that
    best-effort work may add to the walk; decoded_per_walk: tokens that those who decode already bring in one.
    A prefill token yields nothing now; its worth are the outputs that will follow from it, as far as there is
    room for them and rows in the walks: who waits for a row already would only wait longer.
    """
    decoding, prefilling, piggyback = load.copy(), load.copy(), load.copy()
    for _ in range(PROBE_ROWS):
        decoding.add_decode(decode_context)
    prefilling.add_chunk(0, PROBE_ROWS)
    piggyback.add_lane_rows(PROBE_ROWS * num_layers, num_layers)
    now_s = model.walk_s(load, host_is_busy)

    def row_s(more: WalkLoad) -> float:
        return max(LEAST_S, (model.walk_s(more, host_is_busy) - now_s) / PROBE_ROWS)

    decode_s, lane_s = row_s(decoding), row_s(piggyback)
    rows = max(0.0, open_s) / min(decode_s, lane_s)
    free_rows = max(0.0, 1.0 - decoded_per_walk / rows) if rows > 0 else 0.0
    return Values(
        prefill=outputs_per_prompt_token * min(free_share, free_rows) / row_s(prefilling),
        decode=1.0 / decode_s,
        lane=1.0 / lane_s,
    )


def split_rows(total: int, demands: Sequence[int], most: Sequence[int]) -> list[int]:
    """`total` rows over places that ask for `demands` and can take `most` each.

    In proportion where they do not suffice; the rest evenly where they do, for rows that come back within the
    same walk. The shares add up to `total` or to what the places can take.
    """
    asked = sum(demands)
    shares = []
    given = seen = 0
    for demand, limit in zip(demands, most, strict=True):
        seen += demand
        upto = min(asked, total) * seen // asked if asked else 0
        shares.append(min(limit, upto - given))
        given = upto
    left = total - sum(shares)
    while left > 0 and (open_places := [i for i, limit in enumerate(most) if shares[i] < limit]):
        each, extra = divmod(left, len(open_places))
        for rank, i in enumerate(open_places):
            more = min(most[i] - shares[i], each + (rank < extra))
            shares[i] += more
            left -= more
    return shares
