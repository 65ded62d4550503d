"""Twice the capacity: what admission keeps, and what collapses without it."""

from __future__ import annotations

from dataclasses import asdict, replace

from omniserve.bench.slo_plan import Plan, Report, Save, both, over_seeds
from omniserve.bench.slo_run import Result, RunOne, Trial
from omniserve.bench.slo_verdict import KEPT, mean
from omniserve.types import LATENCY_SENSITIVE, SLO


def num_overload_runs(plan: Plan) -> int:
    return 2 * len(plan.seeds)


def run_overload(plan: Plan, run_one: RunOne, save: Save) -> Report:
    """Twice the capacity, batch work present, with admission and without."""
    memory, slo = plan.setup.memory(max(plan.memory_factors)), plan.middle_slo
    jobs, rate = memory.fit(plan.jobs), 2 * plan.setup.capacity
    sides = {"with admission": plan.ours, "without admission": replace(plan.ours, admits_all=True)}
    results: dict[str, list[Result]] = {name: [] for name in sides}
    report: Report = {"rate": rate, "slo": asdict(slo), "contexts": memory.cut(plan.jobs), "sides": {}}
    for seed in plan.seeds:
        for name, variant in sides.items():
            trial = Trial(variant, seed, rate, jobs, memory.num_bytes, slo)
            results[name].append(run_one(trial, plan.timing, name))
            report["sides"][name] = _overload_side(results[name], slo)
            save(report)
    kept = report["sides"]["with admission"]["ttft_of_admitted"]
    report["verdict"] = {"kept": KEPT, "holds": kept is not None and kept >= KEPT}
    return report


def _overload_side(results: list[Result], slo: SLO) -> Report:
    reports = [r.ls(slo) for r in results]
    admitted = [r.admitted for r in reports if r.admitted and r.admitted.ttft is not None]
    number = sum(a.requests for a in admitted)
    outcomes: dict[str, int] = {}
    for report in reports:
        for name, count in report.outcomes.items():
            outcomes[name] = outcomes.get(name, 0) + count
    return {
        "outcomes": outcomes,
        "ttft_of_admitted": sum((a.ttft or 0.0) * a.requests for a in admitted) / number if number else None,
        "both_of_offered": mean([both(r.offered) for r in reports]),
        "goodput": mean([r.goodput or 0.0 for r in reports]),
        "ttft": over_seeds([asdict(r.ttft) for r in reports]),
        "be_tokens_per_s": mean([r.be_tokens_per_s() for r in results]),
        # Waiting over time shows whether the queue grows: (due, TTFT) of the first seed.
        "ttft_over_time_s": [
            (round(r.due_s, 3), round(r.ttft_s, 3))
            for r in results[0].due(LATENCY_SENSITIVE.name)
            if r.ttft_s is not None
        ],
    }
