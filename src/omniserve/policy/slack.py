"""When the next token of a request is due, and who has least time left. docs/policy.md, "Slack"."""

from __future__ import annotations

import math
from collections.abc import Iterable

from omniserve.policy.request import Request

# A request behind its pace is served at most this much faster than its target until it has caught up: one
# hopeless request must not stop best-effort work for good.
CATCH_UP = 0.5
# A prompt that would be late otherwise may use so many gaps of decodes that are ahead of their mean.
MOST_LENT_GAPS = 4.0


def token_due_s(request: Request, lent_gaps: float = 1.0) -> float:
    """When the next token is due, on the engine's clock; infinity without targets.

    The first: `ttft_s` after arrival. Later ones: `lent_gaps` gaps of `tpot_s` after the last one, and not
    later than the mean over all gaps allows, since that is what is measured: only a request ahead of its mean
    can wait longer than one gap.
    """
    if request.slo is None:
        return math.inf
    if request.first_token_s is None or request.last_token_s is None:
        return request.arrival_s + request.slo.ttft_s
    gap_s = request.slo.tpot_s
    by_mean = request.first_token_s + gap_s * request.num_out
    by_gap = request.last_token_s + lent_gaps * gap_s
    return max(min(by_mean, by_gap), request.last_token_s + CATCH_UP * gap_s)


def tightest(requests: Iterable[Request], lent_gaps: float = 1.0) -> tuple[float, int | None]:
    """The earliest due time, and whose it is; (infinity, None) when nobody has targets."""
    due = ((token_due_s(r, lent_gaps), r.id) for r in requests if r.slo is not None)
    return min(due, default=(math.inf, None))


def tightest_tpot_s(requests: Iterable[Request]) -> float:
    return min((r.slo.tpot_s for r in requests if r.slo is not None), default=math.inf)
