"""Everybody side by side, at each memory cap and pair of targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from omniserve.bench.attainment import harvest_share
from omniserve.bench.slo_plan import Plan, Report, Save, cell_of, mean_known, middle, over_seeds, rotated
from omniserve.bench.slo_run import Result, RunOne, Trial
from omniserve.bench.slo_setup import Memory, reference_of
from omniserve.bench.slo_variants import REFERENCE, SLO_AWARE, Variant, device_rows, tunings
from omniserve.bench.slo_verdict import Cell, better, counts, holds, judge, mean
from omniserve.bench.workloads import BatchJobs

TUNING_S = 30.0


def num_mixed_runs(plan: Plan) -> int:
    tuned = sum(map(len, _tunable(plan).values())) if plan.tune else 0
    tuned += tuned > 0  # the reference
    each = sum(len(plan.slo_factors) if v.policy in SLO_AWARE else 1 for v in plan.variants)
    return tuned + len(plan.memory_factors) * len(plan.seeds) * (len(_alone(plan)) + each)


def run_mixed(plan: Plan, run_one: RunOne, save: Save) -> Report:
    """All variants at each memory cap and pair of targets. Runs of one seed follow each other, and begin with
    another variant for each seed, so that what the machine does from hour to hour hits all of them."""
    report: Report = {"tuned": {}, "untuned": {}, "alone": [], "runs": [], "tables": []}
    variants = _tune(plan, run_one, report) if plan.tune else list(plan.variants)
    if not plan.tune:
        report["untuned"] = {v.name: dict(v.extra) for v in plan.variants if v.name in _tunable(plan)}
    for memory in map(plan.setup.memory, plan.memory_factors):
        jobs = memory.fit(plan.jobs)
        alone: dict[str, list[float]] = {}
        found: dict[tuple[str, float], list[Result]] = {}
        for seed in plan.seeds:
            for variant in _alone(plan):
                result = run_one(Trial(variant, seed, 0.0, jobs), plan.timing, "batch alone")
                alone.setdefault(variant.name, []).append(result.be_tokens_per_s())
            for variant, told in _turns(plan, variants, seed):
                slo = None if told is None else plan.setup.slo(told)
                own_jobs = None if variant.policy == REFERENCE else jobs
                trial = Trial(variant, seed, plan.setup.rate, own_jobs, memory.num_bytes, slo)
                result = run_one(trial, plan.timing, f"memory x{memory.factor:g}")
                judged = plan.slo_factors if told is None else (told,)
                for factor in judged:
                    found.setdefault((variant.name, factor), []).append(result)
                slos = {f"{factor:g}": plan.setup.slo(factor) for factor in judged}
                report["runs"].append({"memory_factor": memory.factor, **result.as_dict(slos)})
                save(report)
        report["alone"].append({"memory_factor": memory.factor, "be_tokens_per_s": alone})
        best_alone = max(map(mean, alone.values()))
        for factor in plan.slo_factors:
            results = [found[v.name, factor] for v in variants]
            report["tables"].append(_table(plan, memory, factor, results, best_alone))
        save(report)
    return report


def _alone(plan: Plan) -> tuple[Variant, ...]:
    """Who measures batch work with the box to itself, memory included: ours, and a device with all cores."""
    return plan.ours, replace(plan.ours, host_offload="never", device_threads=plan.all_threads)


def _turns(plan: Plan, variants: Sequence[Variant], seed: int) -> Iterator[tuple[Variant, float | None]]:
    """Every variant with the factor of the targets that it is told, None for those that heed none."""
    turns: list[tuple[Variant, float | None]] = []
    for variant in variants:
        factors = plan.slo_factors if variant.policy in SLO_AWARE else (None,)
        turns += [(variant, f) for f in factors]
    return rotated(turns, plan, seed)


def _tune(plan: Plan, run_one: RunOne, report: Report) -> list[Variant]:
    """Each baseline with its best tunables: one seed, middle memory and targets. Settings are judged as the
    verdict judges, by what the reference reaches in a run like theirs."""
    tunable = _tunable(plan)
    if not tunable:
        return list(plan.variants)
    memory, slo = plan.setup.memory(middle(plan.memory_factors)), plan.middle_slo
    brief = replace(plan.timing, duration_s=min(plan.timing.duration_s, TUNING_S))

    def cell(variant: Variant, jobs: BatchJobs | None) -> Cell:
        told = slo if variant.policy in SLO_AWARE else None
        trial = Trial(variant, plan.seeds[0], plan.setup.rate, jobs, memory.num_bytes, told)
        return cell_of([run_one(trial, brief, "tuning")], slo)

    reference, jobs = cell(reference_of(plan.variants), None), memory.fit(plan.jobs)
    chosen: dict[str, Variant] = {}
    for name, candidates in tunable.items():
        cells = [cell(candidate, jobs) for candidate in candidates]
        best = better(cells, reference)
        chosen[name] = candidates[cells.index(best)]
        report["tuned"][name] = {
            "chosen": dict(chosen[name].extra),
            "reference_offered": reference.attainment,
            "holds": holds(best, reference),
            "tried": [
                {"settings": dict(c.extra), "offered": cell.attainment, "be_tokens_per_s": cell.be_rate}
                for c, cell in zip(candidates, cells, strict=True)
            ],
        }
    return [chosen.get(v.name, v) for v in plan.variants]


def _tunable(plan: Plan) -> dict[str, list[Variant]]:
    """By name of the variant: its settings to try, where there is more than one."""
    return {v.name: found for v in plan.variants if len(found := tunings(v)) > 1}


def _table(plan: Plan, memory: Memory, factor: float, results: list[list[Result]], alone: float) -> Report:
    slo = plan.setup.slo(factor)
    cells = [cell_of(each, slo) for each in results]
    verdict = judge(cells)
    best = next((c for c in cells if c.variant == verdict.best_baseline), None)
    rows = []
    for cell, each in zip(cells, results, strict=True):
        reports = [r.ls(slo) for r in each]
        rows.append(
            {
                **asdict(cell),
                "device_rows": device_rows(each[0].settings),
                "counts": counts(cell, cells),
                "harvest_share": harvest_share(cell.be_rate, alone),
                "be_over_best_baseline": cell.be_rate / best.be_rate if best and best.be_rate else None,
                "requests": sum(r.offered.requests for r in reports if r.offered),
                "be_context": mean_known([r.be().context for r in each]),
                "ttft": over_seeds([asdict(r.ttft) for r in reports]),
                "tpot": over_seeds([asdict(r.tpot) for r in reports]),
            }
        )
    return {
        "memory_factor": memory.factor,
        "slo_factor": factor,
        "slo": asdict(slo),
        "device_tokens": memory.tokens,
        "contexts": memory.cut(plan.jobs),
        "be_alone_tokens_per_s": alone,
        "rows": rows,
        "verdict": asdict(verdict),
    }
