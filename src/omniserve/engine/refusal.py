"""Why a request was refused at its arrival, in words."""

from __future__ import annotations

from omniserve.policy.admission import Admission
from omniserve.policy.explanation import Refusal
from omniserve.policy.request import Request

# What stands against a refused request, and the ways out besides trying again later.
OBSTACLES = {
    "ttft": ("its first token would be late", "with a looser ttft_s"),
    "tpot": ("with it, tokens would come too slowly", "with a looser tpot_s if its own is the tightest"),
    "others": ("requests already admitted would be late because of it", "with a looser ttft_s, behind them"),
    "memory": (
        "device_memory_bytes cannot hold it beside those already admitted",
        "with fewer max_tokens, or raise device_memory_bytes",
    ),
    "rows": (
        "a walk has no row for it beside those already admitted",
        "raise max_num_seqs (and max_num_batched_tokens, where that is less)",
    ),
}


def refusal_of(verdict: Admission, request: Request, now: float) -> Refusal:
    """A refusal as it is remembered."""
    assert verdict.obstacle is not None
    assert verdict.predicted_ttft_s is not None, "a refusal has its reasons"
    assert verdict.target_ttft_s is not None, "a request without targets is admitted"
    return Refusal(
        now,
        request.id,
        request.service_class,
        verdict.obstacle,
        verdict.predicted_ttft_s,
        verdict.target_ttft_s,
        verdict.predicted_tpot_s,
        verdict.target_tpot_s,
    )


def refusal_text(verdict: Admission) -> str:
    """Why, with the times that decided, and what may help."""
    assert verdict.obstacle is not None
    what, way_out = OBSTACLES[verdict.obstacle]
    times = ""
    if verdict.obstacle == "tpot" and verdict.predicted_tpot_s is not None:
        times = f" (predicted tpot_s {verdict.predicted_tpot_s:.3g}, target {verdict.target_tpot_s:.3g})"
    elif verdict.obstacle == "ttft":
        times = f" (predicted ttft_s {verdict.predicted_ttft_s:.3g}, target {verdict.target_ttft_s:.3g})"
    return f"{what}{times}; try again later, or {way_out}"
