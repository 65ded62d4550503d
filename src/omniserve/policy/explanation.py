"""Why a plan is as it is, and why a request was refused: plain data for people and programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omniserve.policy.latency import WalkLoad

Reason = Literal["slack", "rows", "pages", "lanes_unserved", "host_full", "host_gains_nothing"]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A request that could have had a row in a plan and had none. Of those in line behind it nothing is said.

    reason: "slack" no time left under the budget; "rows" of the walk's buffers; "pages" of the device;
    "lanes_unserved" lanes wait already; "host_full" no slot or page for it after its prefill;
    "host_gains_nothing" no row for it here, and the host, which has memory for it, has no bandwidth left for
    another lane.
    """

    request_id: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Explanation:
    """What one plan was made by. Seconds.

    slack_s, tightest  left under the tightest target, and the request whose it is; None: nobody has one. With
                       what is lent, where a prompt would be late otherwise.
    budget_s           what the walk may take by `bound_s`: the slack, unless what must be done takes longer;
                       None: nothing bounds it.
    latency_sensitive_s
                       of the budget, what latency-sensitive rows alone take, by `bound_s`.
    best_effort_s      budget for a walk with best-effort rows: also bounded by what waiting prompts and
                       arrivals can stand, and raised by what is owed to best-effort work.
    newcomers_spare_s  what likely newcomers could spare; None: none are to be expected, or nobody asked.
    predicted_s, bound_s
                       of the walk as planned, its lane rows included: expected, and with the learned margin.
    host_is_busy       share of the time in which the host is expected to stream.
    values             best-effort tokens per second of device time of each use, the best first.
    """

    policy: str
    slack_s: float | None
    tightest: int | None
    budget_s: float | None
    latency_sensitive_s: float
    best_effort_s: float
    predicted_s: float
    bound_s: float
    host_is_busy: float
    load: WalkLoad
    values: tuple[tuple[str, float], ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    newcomers_spare_s: float | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A latency-sensitive request that was refused at its arrival. `at_s`: on the engine's clock. TPOT: of
    everybody with it, and the tightest target; None where nobody has foretold it."""

    at_s: float
    request_id: int
    service_class: str
    reason: str
    predicted_ttft_s: float
    target_ttft_s: float
    predicted_tpot_s: float | None = None
    target_tpot_s: float | None = None
