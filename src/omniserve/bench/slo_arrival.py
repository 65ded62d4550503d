"""How long a chat waits that comes to an engine full of batch work: no other chat is there.

Each is as small as can be, so that its first token takes next to no time of its own: what it takes longer
than without batch work is its wait, for the walk under way and for the batch rows of the one that it rides
in. Together they keep to the bound that no walk with best-effort rows exceeds (docs/policy.md).
"""

from __future__ import annotations

import random
import statistics
from dataclasses import asdict, replace

from omniserve.bench.attainment import latency
from omniserve.bench.slo_plan import Plan, Report, Save, rotated
from omniserve.bench.slo_run import Result, RunOne, Trial
from omniserve.bench.slo_verdict import mean
from omniserve.bench.workloads import Arrival
from omniserve.errors import OmniServeError
from omniserve.policy.terms import WALK_BOUND_SHARE
from omniserve.types import LATENCY_SENSITIVE

PROMPT, OUTPUT = 16, 1
GAP_S = 1.0  # between two arrivals, on average and about
BESIDE, ALONE = "beside batch", "alone"


def num_arrival_runs(plan: Plan) -> int:
    return 2 * len(plan.seeds)


def run_arrival(plan: Plan, run_one: RunOne, save: Save) -> Report:
    """The same lone chats beside a full backlog and without any; nobody is refused, so every wait counts."""
    memory, slo = plan.setup.memory(max(plan.memory_factors)), plan.middle_slo
    ours, jobs = replace(plan.ours, admits_all=True), memory.fit(plan.jobs)
    sides = {BESIDE: jobs, ALONE: None}
    results: dict[str, list[Result]] = {name: [] for name in sides}
    report: Report = {
        "slo": asdict(slo),
        "walk_bound_s": WALK_BOUND_SHARE * slo.ttft_s,
        "contexts": memory.cut(plan.jobs),
    }
    for seed in plan.seeds:
        chats = lone_chats(plan.timing.total_s, seed)
        for name, backlog in rotated(list(sides.items()), plan, seed):
            trial = Trial(ours, seed, 1 / GAP_S, backlog, memory.num_bytes, slo, arrivals=chats)
            results[name].append(run_one(trial, plan.timing, name))
    report |= _waits(results[BESIDE], results[ALONE])
    report["be_tokens_per_s"] = mean([r.be_tokens_per_s() for r in results[BESIDE]])
    over_bound = report["wait"]["p99"] / report["walk_bound_s"]
    report["verdict"] = {"p99_over_bound": over_bound, "holds": over_bound <= 1.0}
    save(report)
    return report


def lone_chats(duration_s: float, seed: int) -> tuple[Arrival, ...]:
    """One in each gap, anywhere in its first half, so that they keep no step with the walks."""
    rng = random.Random(f"{seed} lone chats")
    starts = (i * GAP_S + rng.uniform(0, GAP_S / 2) for i in range(int(duration_s / GAP_S)))
    return tuple(Arrival(at_s, PROMPT, OUTPUT) for at_s in starts)


def _waits(beside: list[Result], alone: list[Result]) -> Report:
    own, theirs = _ttfts(alone), _ttfts(beside)
    if not own or not theirs:
        raise OmniServeError("arrival: no chat had a first token in the time; raise --duration or --drain")
    own_s = statistics.median(own)
    waits = [max(0.0, ttft_s - own_s) for ttft_s in theirs]
    return {"chats": len(waits), "ttft_alone_s": own_s, "wait": asdict(latency(waits)), "waits_s": waits}


def _ttfts(results: list[Result]) -> list[float]:
    """Of all seeds. One without a first token waited as long as the run let it."""
    due = [(result, record) for result in results for record in result.due(LATENCY_SENSITIVE.name)]
    return [
        record.ttft_s
        if record.ttft_s is not None
        else result.timing.total_s + result.timing.drain_s - record.due_s
        for result, record in due
    ]
