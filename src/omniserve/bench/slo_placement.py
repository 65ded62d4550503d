"""Where batch work should decode, by context length and memory cap; whether `auto` finds out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from omniserve.bench.slo_plan import Plan, Report, Save, both, mean_known, rotated
from omniserve.bench.slo_run import Result, RunOne, Trial
from omniserve.bench.slo_setup import Memory, reference_of
from omniserve.bench.slo_variants import Variant
from omniserve.bench.slo_verdict import Placement, mean
from omniserve.config import HostOffload


@dataclass(slots=True)
class Spot:
    """One context length at one memory cap, per seed of each choice: batch tokens/s, attainment.

    context is that of a job at its end; contexts: what decode attention really read, mean over the seeds.
    reference: attainment of ls_only at that cap.
    """

    context: int
    memory_factor: float
    reference: list[float]
    rates: dict[str, list[float]] = field(default_factory=dict)
    offered: dict[str, list[float]] = field(default_factory=dict)
    contexts: dict[str, float | None] = field(default_factory=dict)


CONTEXTS = (256, 1024, 4096)
CHOICES: dict[str, HostOffload] = {"auto": "auto", "lanes": "always", "device": "never"}
WHOLE_BOX = "device, all cores"


def num_placement_runs(plan: Plan) -> int:
    memories = [plan.setup.memory(f) for f in plan.memory_factors]
    spots = sum(len(_contexts(m)) for m in memories)
    references = sum(bool(_contexts(m)) for m in memories)
    return (spots * len(_choices(plan)) + references) * len(plan.seeds)


def run_placement(plan: Plan, run_one: RunOne, save: Save) -> Report:
    """Batch tokens/s by context length and memory cap, beside the latency-sensitive stream: decode chosen by
    the engine, always by host attention, never. The device with all cores is shown too: it is another split
    of the machine, which no choice at run time reaches. ls_only says what attainment is to be had at each
    cap: a choice that breaks targets does not win."""
    report: Report = {"slo": asdict(plan.middle_slo), "spots": [], "left_out": []}
    for memory in map(plan.setup.memory, plan.memory_factors):
        fitting = _contexts(memory)
        report["left_out"] += [
            {"context": context, "memory_factor": memory.factor, "device_tokens": memory.tokens}
            for context in CONTEXTS
            if context not in fitting
        ]
        reference = _reference(plan, memory, run_one) if fitting else []
        for context in fitting:
            spot = _measure_spot(plan, memory, context, reference, run_one)
            report["spots"].append(asdict(spot) | placement_verdict(spot))
            report["verdict"] = _over_spots(report["spots"])
            save(report)
    return report


def _contexts(memory: Memory) -> list[int]:
    """Those that the device could hold at all."""
    return [context for context in CONTEXTS if context <= memory.tokens]


def _reference(plan: Plan, memory: Memory, run_one: RunOne) -> list[float]:
    variant, slo = reference_of(plan.variants), plan.middle_slo
    trials = [Trial(variant, s, plan.setup.rate, None, memory.num_bytes) for s in plan.seeds]
    what = f"memory x{memory.factor:g}"
    return [both(run_one(trial, plan.timing, what).ls(slo).offered) for trial in trials]


def _measure_spot(plan: Plan, memory: Memory, context: int, reference: list[float], run_one: RunOne) -> Spot:
    jobs, slo = replace(plan.jobs, low=context, high=context), plan.middle_slo
    results: dict[str, list[Result]] = {name: [] for name in _choices(plan)}
    for seed in plan.seeds:
        for name, variant in rotated(list(_choices(plan).items()), plan, seed):
            trial = Trial(variant, seed, plan.setup.rate, jobs, memory.num_bytes, slo)
            results[name].append(run_one(trial, plan.timing, f"context {context}, memory x{memory.factor:g}"))
    return Spot(
        context,
        memory.factor,
        reference,
        {name: [r.be_tokens_per_s() for r in each] for name, each in results.items()},
        {name: [both(r.ls(slo).offered) for r in each] for name, each in results.items()},
        {name: mean_known([r.be().context for r in each]) for name, each in results.items()},
    )


def _choices(plan: Plan) -> dict[str, Variant]:
    found = {name: replace(plan.ours, host_offload=offload) for name, offload in CHOICES.items()}
    if plan.ours.device_threads != plan.all_threads:
        found[WHOLE_BOX] = replace(plan.ours, host_offload="never", device_threads=plan.all_threads)
    return found


def placement_verdict(spot: Spot) -> Report:
    rates, attained = ({name: mean(per[name]) for name in CHOICES} for per in (spot.rates, spot.offered))
    found = Placement(rates, attained, mean(spot.reference))
    return {
        "holds": {name: found.holds(name) for name in CHOICES},
        "winner": found.winner,
        "auto_share_of_winner": found.share,
        "is_near": found.is_near,
    }


def _over_spots(spots: list[Report]) -> Report:
    """Not known is not met."""
    known = [spot["is_near"] for spot in spots if spot["is_near"] is not None]
    return {
        "spots": len(spots),
        "near": sum(known),
        "not_known": len(spots) - len(known),
        "holds": sum(known) == len(spots),
    }
